"""DenseNet training on ImageNet, as a library: this module is the public API, see docs/api.md.

`import pipeline` is fast: each name is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.config_file import load_config
    from pipeline.data.batches import Batches
    from pipeline.data.dali import Batch
    from pipeline.data.open import Dataset, open_dataset
    from pipeline.errors import ConfigError, DataError, TrainingError, UserError
    from pipeline.evaluation.evaluate import Evaluation
    from pipeline.evaluation.scores import Scores
    from pipeline.export.open import Exported, TrainedModel, open_model
    from pipeline.export.predict import FolderPredictions, Prediction
    from pipeline.model.card import ModelCard, Transform
    from pipeline.single_process import FittedRun, fit

__all__ = [  # noqa: RUF022, ordered by purpose
    "load_config",
    "fit",
    "open_dataset",
    "open_model",
    "RunConfig",
    "Batch",
    "Batches",
    "Dataset",
    "Evaluation",
    "Exported",
    "FittedRun",
    "FolderPredictions",
    "ModelCard",
    "Prediction",
    "Scores",
    "TrainedModel",
    "Transform",
    "ConfigError",
    "DataError",
    "TrainingError",
    "UserError",
]

_MODULES = {
    "load_config": "config_file",
    "fit": "single_process",
    "FittedRun": "single_process",
    "open_dataset": "data.open",
    "open_model": "export.open",
    "RunConfig": "config",
    "Batch": "data.dali",
    "Batches": "data.batches",
    "Dataset": "data.open",
    "Evaluation": "evaluation.evaluate",
    "Exported": "export.open",
    "FolderPredictions": "export.predict",
    "ModelCard": "model.card",
    "Prediction": "export.predict",
    "Scores": "evaluation.scores",
    "TrainedModel": "export.open",
    "Transform": "model.card",
    "ConfigError": "errors",
    "DataError": "errors",
    "TrainingError": "errors",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, *globals()]
