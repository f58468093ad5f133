"""DenseNets: importing this package registers the project's additions with timm."""

from pipeline.model.densenet import ARCHITECTURES, PAPER, create, size

__all__ = ["ARCHITECTURES", "PAPER", "create", "size"]
