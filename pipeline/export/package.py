"""Packages a checkpoint as an MLflow pyfunc model and registers it."""

import base64
import importlib.metadata
import io
import json
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType, Array
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from PIL import Image

from pipeline.errors import UserError
from pipeline.model.card import CARD, ModelCard
from pipeline.tracking.client import connect, connect_registry, first_line
from pipeline.tracking.registry import create_registered_model, find_version, move_alias
from pipeline.tracking.stores import Stores, redacted

_CODE = Path(__file__).with_name("pyfunc_model.py")
_REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "timm", "torch", "torchvision")
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(AnyType(), "image")]),  # bytes, base64 text, arrays, paths
    outputs=Schema(
        [
            ColSpec(DataType.long, "class_id"),
            ColSpec(DataType.string, "class_name"),
            ColSpec(DataType.double, "probability"),
            ColSpec(Array(DataType.double), "probabilities"),
        ]
    ),
)


@dataclass(frozen=True)
class RegisteredModel:
    """A model version in the registry, with its alias."""

    name: str
    version: str
    alias: str

    @property
    def uri(self) -> str:
        """MLflow's URI of the alias."""
        return f"models:/{self.name}@{self.alias}"


def register(
    checkpoint: Path,
    *,
    stores: Stores,
    run_id: str,
    name: str,
    alias: str,
    data_fingerprint: str,
    data_license: str | None = None,
) -> RegisteredModel:
    """Packages a checkpoint's model, stores it with the run, registers it and moves `alias` to the new version.

    The package has the better of `model.safetensors` and `ema.safetensors`, `model.json` (architecture, classes,
    transform) and the code that loads them. Results, transform and origin are tags of the version. If an earlier call
    registered this checkpoint but failed to set the alias, that version is reused.

    All calls use one client: MLflow's `log_model` takes URIs and run from process-wide state or the environment, and
    could register the model in another store than the alias.

    Raises:
        UserError: A store rejects the model; the checkpoint stays unchanged.
    """
    card = ModelCard.read(checkpoint)
    tags = _tags(card, data_fingerprint) | ({} if data_license is None else {"data.license": data_license})
    tags["checkpoint"] = checkpoint.name
    version = find_version(run_id, name, tags, stores)
    if version is None:
        try:
            version = _create_version(checkpoint, card, stores, run_id, name, tags)
        except Exception as error:  # artifact stores raise errors of many kinds
            uri = stores.registry
            raise UserError(
                f"the model could not be registered in {redacted(uri)}: {first_line(error, uri)} "
                f"The checkpoint is {checkpoint}."
            ) from error
    move_alias(name, alias, version, stores)
    return RegisteredModel(name, version, alias)


def _create_version(
    checkpoint: Path, card: ModelCard, stores: Stores, run_id: str, name: str, tags: dict[str, str]
) -> str:
    """Stores the model with its run and registers a model version."""
    connect(stores.tracking)
    client = connect_registry(stores)
    run = client.get_run(run_id)
    experiment = client.get_experiment(run.info.experiment_id)
    with tempfile.TemporaryDirectory() as folder:
        logged = _log(client, run.info.experiment_id, run_id, run.data.params, checkpoint, card, Path(folder, "run"))
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        create_registered_model(client, name)
        if not stores.separate_registry or not stores.registry.startswith("http"):
            source, model_id = logged.artifact_location, None if stores.separate_registry else logged.model_id
        else:  # a registry server does not register artifacts of another server: upload a copy
            registry = MlflowClient(tracking_uri=stores.registry, registry_uri=stores.registry)
            existing = registry.get_experiment_by_name(experiment.name)
            copy_id = registry.create_experiment(experiment.name) if existing is None else existing.experiment_id
            copy = _log(registry, copy_id, None, run.data.params, checkpoint, card, Path(folder, "registry"))
            source, model_id = copy.artifact_location, copy.model_id
    version = client.create_model_version(name, source, run_id, tags=tags, model_id=model_id)
    if not stores.separate_registry:
        versions = json.dumps([{"name": name, "version": version.version}])
        client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: versions})
    return str(version.version)


def _log(
    client: MlflowClient,
    experiment_id: str,
    run_id: str | None,
    params: dict[str, str],
    checkpoint: Path,
    card: ModelCard,
    folder: Path,
) -> LoggedModel:
    """Packages a checkpoint in `folder` and logs it as a model of the experiment, and of the run if there is one."""
    logged = client.create_logged_model(experiment_id, "model", run_id, params=params)
    try:
        # Suppresses MLflow's packaging advice and progress messages, which do not apply here.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            mlflow.pyfunc.save_model(
                str(folder),
                python_model=str(_CODE),
                code_paths=_model_code(card, checkpoint),
                artifacts={"weights": str(checkpoint / card.weights), "card": str(checkpoint / CARD)},
                signature=SIGNATURE,
                input_example=_example(card.transform.resize),
                pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in _REQUIREMENTS],
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    run_id=run_id,
                    model_uuid=logged.model_id,
                    model_id=logged.model_id,
                ),
            )
            client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        with suppress(MlflowException):  # the first error is raised below
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    return client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)


def _model_code(card: ModelCard, checkpoint: Path) -> list[str] | None:
    """Returns the code of a plugin's model, which is packaged with it; None for models of timm and this project."""
    from pipeline.model.weights import import_model_code  # torch and timm take seconds to import

    import_model_code(card, checkpoint)
    module = card.architecture.get("module")
    if module is None:
        return None
    file = Path(str(sys.modules[module.split(".")[0]].__file__))
    return [str(file.parent if file.name == "__init__.py" else file)]


def _example(side: int) -> pd.DataFrame:
    """Returns an input example: one gray JPEG in base64, as sent to a model server."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (128, 128, 128)).save(buffer, "JPEG")
    return pd.DataFrame({"image": [base64.b64encode(buffer.getvalue()).decode()]})


def _tags(card: ModelCard, data_fingerprint: str) -> dict[str, str]:
    """Returns the tags of a model version: results, evaluation transform, architecture, training data."""
    metrics = card.metrics
    results = {key: metrics[key] for key in ("top1_correct", "top5_correct", "top5_k", "total")} if metrics else {}
    tags = {
        **results,
        "architecture": card.name,
        "weights": card.weights,
        "samples_seen": card.samples_seen,
        "epoch": f"{card.epoch:g}",
        "transform": json.dumps(asdict(card.transform)),
        "data.fingerprint": data_fingerprint,
        "config_hash": card.config_hash,
    }
    return {key: str(value) for key, value in tags.items()}
