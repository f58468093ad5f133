"""Models by name, through timm's registry; and the DenseNets that it lacks, on timm's own `DenseNet` class.

`densenet264` is the paper's (growth rate 32); timm's `densenet264d` is another model (growth rate 48, deep stem).
"""

from collections.abc import Callable
from typing import Any

import timm
from timm.models import DenseNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import _cfg, _create_densenet
from torch import nn

from pipeline.config import Model
from pipeline.errors import ConfigError
from pipeline.model.architectures import ARCHITECTURES, unusual
from pipeline.model.memory import save_memory
from pipeline.model.timm_models import check_name


class CifarDenseNet(DenseNet):
    """timm's DenseNet with the paper's stem for small images: one 3x3 convolution, neither norm nor pooling."""

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
    """A function for timm's registry; `pretrained=True` is refused by timm, for there are no public weights."""

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
    """Builds a model with timm's initial weights, in fp32 on torch's default device; `timm.models.DenseNet` for its models.

    A DenseNet's convolutions are He-initialized (He et al. 2015, fan-in).

    Args:
        model: The config's section, or a name, which stands for the section's defaults.
        num_classes: The number of logits.

    Returns:
        A module mapping images [B, C, H, W] to logits [B, num_classes].

    Raises:
        ConfigError: the name is unknown, or the model has not what the section asks for.
    """
    model = Model(name=model) if isinstance(model, str) else model
    check_name(model.name)
    given = {"drop_rate": model.drop_rate, "proj_drop_rate": model.layer_drop_rate}
    options = unusual(model) | {key: rate for key, rate in given.items() if rate}
    try:
        network = timm.create_model(model.name, num_classes=num_classes, **options)
    except (TypeError, AssertionError) as error:  # in timm's words: an argument that the model does not take
        raise ConfigError(
            f"model.name={model.name} cannot be made with {options}, which follow from model.in_chans, global_pool, "
            f"drop_rate and layer_drop_rate: {error}. Leave out what it does not have."
        ) from error
    if not isinstance(network, DenseNet):
        for key, value in (("layer_drop_rate", model.layer_drop_rate), ("memory", model.memory)):
            if value not in (0, "none"):
                raise ConfigError(
                    f"model.{key}={value} is of DenseNets, and model.name={model.name} is none: leave it out."
                )
        return network
    save_memory(network, model.memory)
    return network
