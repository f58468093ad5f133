"""The models: DESIGN's parameter counts, timm's registry, near names."""

import pytest
import timm
import torch

from pipeline.errors import ConfigError
from pipeline.model import create, parameter_count


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("densenet121", 7_978_856),
        ("densenet169", 14_149_480),
        ("densenet201", 20_013_928),
        ("densenet264", 33_337_704),
    ],
)
def test_parameters_equal_the_published_counts(name, parameters):
    assert parameter_count(name, 1000) == parameters


def test_additions_are_in_timms_registry():
    model = timm.create_model("densenet264", num_classes=7)
    assert type(model).__module__ == "timm.models.densenet"
    assert model.num_classes == 7


def test_the_state_dict_is_timms_own():
    ours, theirs = create("densenet121", 10), timm.create_model("densenet121", num_classes=10)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images_NCHW = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images_NCHW), theirs.eval()(images_NCHW))


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"model.name='densnet121' is not known. Did you mean 'densenet121'"):
        create("densnet121", 10)
