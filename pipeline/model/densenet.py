"""Creates models by name through timm's registry, and registers the DenseNets that timm lacks.

The additional DenseNets use timm's `DenseNet` class. `densenet264` is the model of the paper (growth rate 32); timm's
`densenet264d` is a different model (growth rate 48, deep stem).
"""

from collections.abc import Callable
from typing import Any

import timm
from timm.models import DenseNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import _cfg, _create_densenet
from torch import nn

from pipeline.config import Model
from pipeline.errors import ConfigError
from pipeline.model.architectures import ARCHITECTURES, non_default_options
from pipeline.model.memory import apply_memory_mode
from pipeline.model.timm_models import check_name


class CifarDenseNet(DenseNet):
    """timm's DenseNet with the paper's CIFAR stem: one 3x3 convolution without batch norm and pooling."""

    def __init__(self, growth_rate: int, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(growth_rate=growth_rate, in_chans=in_chans, **kwargs)
        self.features.conv0 = nn.Conv2d(in_chans, 2 * growth_rate, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.features.conv0.weight)
        del self.features.norm0, self.features.pool0
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)
        self.feature_info[0]["module"] = "features.conv0"
        names = [name for name, _ in self.features.named_children()]
        self.feature_ends = [names.index(info["module"].split(".", 1)[1]) for info in self.feature_info]


_SMALL = {"input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": _cfg(**(_SMALL if architecture.get("stem_type") == "cifar" else {}))
        for name, architecture in ARCHITECTURES.items()
        if name not in timm.list_models()
    }
)


def _entry_point(name: str) -> Callable[..., DenseNet]:
    """Returns a model builder for timm's registry. timm rejects `pretrained=True`: there are no public weights."""

    def build(pretrained: bool = False, **kwargs: Any) -> DenseNet:
        architecture = dict(ARCHITECTURES[name])
        if architecture.pop("stem_type", "") == "cifar":
            features = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}
            return build_model_with_cfg(CifarDenseNet, name, pretrained, feature_cfg=features, **architecture, **kwargs)
        return _create_densenet(name, pretrained=pretrained, **architecture, **kwargs)

    build.__name__ = name
    build.__module__ = __name__
    return build


for _name in (cfg.removesuffix(".untrained") for cfg in list(default_cfgs)):
    register_model(_entry_point(_name))


def create(model: Model | str, num_classes: int) -> nn.Module:
    """Creates a model with timm's weight initialization, in fp32 on torch's default device.

    DenseNets are instances of `timm.models.DenseNet`; their convolutions are He-initialized (He et al. 2015, fan-in).

    Args:
        model: The config section `model`, or a model name with default options.
        num_classes: The number of logits.

    Returns:
        A module that maps images [B, C, H, W] to logits [B, num_classes].

    Raises:
        ConfigError: The name is unknown, or the model does not support an option.
    """
    model = Model(name=model) if isinstance(model, str) else model
    check_name(model.name)
    dropout = {"drop_rate": model.drop_rate, "proj_drop_rate": model.layer_drop_rate}
    options = non_default_options(model) | {key: rate for key, rate in dropout.items() if rate}
    try:
        network = timm.create_model(model.name, num_classes=num_classes, **options)
    except (TypeError, AssertionError) as error:  # timm raises these for an unsupported argument
        raise ConfigError(
            f"model.name={model.name} cannot be created with {options} (from model.in_chans, global_pool, drop_rate "
            f"and layer_drop_rate): {error}. Remove the options that this model does not support."
        ) from error
    if not isinstance(network, DenseNet):
        for key, value in (("layer_drop_rate", model.layer_drop_rate), ("memory", model.memory)):
            if value not in (0, "none"):
                raise ConfigError(
                    f"model.{key}={value} applies to DenseNets only, and model.name={model.name} is not one: remove it."
                )
        return network
    apply_memory_mode(network, model.memory)
    return network
