"""The models: published parameter counts, timm's registry, the CIFAR stem, suggestions for misspelled names."""

import math

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import densenet121

from pipeline.config import Model
from pipeline.errors import ConfigError
from pipeline.model.architectures import ARCHITECTURES, Size, size
from pipeline.model.densenet import create


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [
        ("densenet121", 7_978_856, 2.834),
        ("densenet169", 14_149_480, 3.360),
        ("densenet201", 20_013_928, 4.291),
        ("densenet264", 33_337_704, 5.752),
    ],
)
def test_parameters_and_multiply_adds_match_the_published_values(name, parameters, giga):
    counted = size(name, 1000, 224)
    assert counted.parameters == parameters
    assert round(counted.multiply_adds / 1e9, 3) == giga


@pytest.mark.parametrize(
    ("name", "millions"),
    [("densenet_bc_l100_k12", 0.8), ("densenet_bc_l250_k24", 15.3), ("densenet_bc_l190_k40", 25.6)],
)
def test_parameters_of_the_cifar_models_match_the_paper(name, millions):
    assert round(size(name, 10, 32).parameters / 1e6, 1) == millions


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_arithmetic_counts_equal_torchs_flop_counter(name):
    if name in ("densenet_bc_l250_k24", "densenet_bc_l190_k40"):
        pytest.skip("torch takes a minute for 750 and 570 layers; the table above has the paper's counts")
    for side, options in ((32, {}), (75, {"in_chans": 1, "global_pool": "catavgmax"})):
        model = Model(name=name, **options)
        with torch.device("meta"):
            network = create(model, 7).eval()
            image_1CHW = torch.empty(1, model.in_chans, side, side)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image_1CHW)
        counted = Size(sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)
        assert size(model, 7, side) == counted


def test_additional_models_are_in_timms_registry():
    model = timm.create_model("densenet264", num_classes=7)
    assert type(model).__module__ == "timm.models.densenet"
    assert model.num_classes == 7


def test_the_cifar_stem_keeps_the_image_size_and_timms_feature_info():
    images_NCHW = torch.randn(2, 3, 32, 32)
    assert create("densenet_bc_l40_k12", 10)(images_NCHW).shape == (2, 10)
    pyramid = timm.create_model("densenet_bc_l40_k12", features_only=True)
    assert [tuple(f.shape[1:]) for f in pyramid(images_NCHW)] == [
        (24, 32, 32),
        (96, 32, 32),
        (120, 16, 16),
        (132, 8, 8),
    ]
    assert pyramid.feature_info.reduction() == [1, 1, 2, 4]


def test_convolutions_are_he_initialized():
    torch.manual_seed(0)
    for module in create("densenet121", 10).modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)


def test_the_state_dict_equals_timms_and_torchvisions():
    ours, theirs = create("densenet121", 10), timm.create_model("densenet121", num_classes=10)
    images_NCHW = torch.randn(1, 3, 64, 64)
    for other in (theirs, densenet121(num_classes=10)):
        ours.load_state_dict(other.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.allclose(ours.eval()(images_NCHW), other.eval()(images_NCHW), rtol=1e-5, atol=1e-6)


def test_an_unknown_name_is_rejected_with_the_closest_match():
    with pytest.raises(ConfigError, match=r"model.name='densnet121' is not known. Did you mean 'densenet121'"):
        create("densnet121", 10)
