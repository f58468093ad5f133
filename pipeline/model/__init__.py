"""DenseNets: importing this package registers the project's additions with timm."""

from pipeline.model.densenet import ARCHITECTURES, create, parameter_count

__all__ = ["ARCHITECTURES", "create", "parameter_count"]
