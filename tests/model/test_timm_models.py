"""Other timm models than DenseNets: supported options work, unsupported options are rejected."""

import pytest
import timm
import torch
from torch import nn

from pipeline.config import Model, RunConfig
from pipeline.errors import ConfigError
from pipeline.model.densenet import create
from pipeline.model.timm_models import check_model, check_name, size
from pipeline.model.weights import load_weights, lr_scales
from pipeline.train.optim import parameter_groups


@pytest.mark.parametrize(("name", "millions", "giga"), [("resnet50", 25.6, 4.1), ("rdnet_tiny", 23.9, 5.0)])
def test_parameters_and_multiply_adds_match_the_published_values(name, millions, giga):
    counted = size(Model(name=name), 1000, 224)
    assert round(counted.parameters / 1e6, 1) == millions
    assert round(counted.multiply_adds / 1e9, 1) == giga


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "resnet5"}}, r"model.name='resnet5' is not known. Did you mean 'resnet50'"),
        ({"model": {"name": "resnet50.a1_in1k"}}, r"is not known.* without the tags of weights"),
        (
            {"model": {"name": "resnet50", "memory": "activation-checkpointing"}},
            r"model.memory=activation-checkpointing applies to DenseNets only",
        ),
        (
            {"model": {"name": "resnet50", "layer_drop_rate": 0.1}},
            r"cannot be created with .*model.in_chans, global_pool, drop_rate and layer_drop_rate",
        ),
        ({"finetune": {"freeze_blocks": 2}}, r"finetune.freeze_blocks=2 applies to models with dense blocks"),
        (
            {"model": {"name": "rdnet_tiny"}, "finetune": {"layer_decay": 0.7}},
            r"finetune.layer_decay=0.7 applies to models with",
        ),
        (
            {"model": {"name": "test_vit"}, "engine": {"sync_batch_norm": True}},
            r"engine.sync_batch_norm=true applies to models with batch norm only",
        ),
        (
            {"model": {"name": "test_vit", "in_chans": 1, "global_pool": "catavgmax"}},
            r"cannot be created with \{'in_chans'",
        ),
        (
            {"model": {"name": "vit_tiny_patch16_224"}, "data": {"image_size": 192}},
            r"data.image_size=192 does not fit model.name=vit_tiny_patch16_224 .*its default size is 224",
        ),
    ],
)
def test_unsupported_options_are_rejected(sections, message):
    config = RunConfig.model_validate({"model": {"name": "resnet50"}} | sections)
    with pytest.raises(ConfigError, match=message):
        check_model(config)


@pytest.mark.parametrize("name", ["densenet_tiny", "test_resnet", "test_vit", "deit_tiny_distilled_patch16_224"])
def test_supported_options_are_accepted(name):
    check_name(name)
    check_model(
        RunConfig.model_validate({"model": {"name": name}, "finetune": {"layer_decay": 0.7, "head_lr_mult": 10}})
    )


def test_weights_with_another_number_of_classes_keep_the_new_classifier(tmp_path):
    file = tmp_path / "five.pth"
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), file)
    model = create("test_resnet", 3)
    fresh = model.fc.weight.clone()
    assert not load_weights(model, file).head_loaded
    assert torch.equal(model.fc.weight, fresh)
    assert load_weights(create("test_resnet", 5), file).head_loaded


def test_head_lr_mult_applies_to_the_classifier_whatever_its_name():
    finetune = RunConfig.model_validate({"finetune": {"head_lr_mult": 10}}).finetune
    assert lr_scales(create("rdnet_tiny", 3), finetune) == {"head.fc.weight": 10, "head.fc.bias": 10}


def test_norms_scales_and_embeddings_have_no_weight_decay():
    for name in ("rdnet_tiny", "test_vit", "resnet50"):
        model = create(name, 3)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = {group["weight_decay"]: group["params"] for group in parameter_groups(model, 0.1)}
        modules = dict(model.named_modules())
        for parameter in groups[0.1]:
            prefix, _, last = names[id(parameter)].rpartition(".")
            assert last == "weight"
            assert isinstance(modules[prefix], nn.Conv2d | nn.Linear)
        assert sum(len(parameters) for parameters in groups.values()) == len(names)
        assert all(parameter.ndim > 1 for parameter in groups[0.1])
