"""A checkpoint becomes a registered MLflow model."""

import base64
import importlib.metadata
import io
import json
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType, Array
from PIL import Image

from pipeline.errors import UserError
from pipeline.tracking.store import connect, first_line, shown

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
class Registered:
    """A model version in the registry."""

    name: str
    version: str
    alias: str

    @property
    def uri(self) -> str:
        """MLflow's address of the alias."""
        return f"models:/{self.name}@{self.alias}"


def register(
    checkpoint: Path,
    *,
    uri: str,
    run_id: str,
    name: str,
    alias: str,
    data_fingerprint: str,
    data_license: str | None = None,
) -> Registered:
    """Packages a checkpoint's model, stores it with the run, registers it and moves `alias` to it.

    The model is the better of `model.safetensors` and `ema.safetensors` with `model.json` (architecture, classes,
    transform) and the code that reads them; results, transform and origin are tags of the version.

    Raises:
        UserError: the store refuses the model; the checkpoint is untouched.
    """
    client = connect(uri)
    card = json.loads((checkpoint / "model.json").read_text(encoding="utf-8"))
    try:
        # MLflow's advice on packaging and its announcements of each step are of no use to the user here.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            mlflow.set_tracking_uri(uri)
            with mlflow.start_run(run_id=run_id):
                info = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(_CODE),
                    artifacts={
                        "weights": str(checkpoint / card["weights"]),
                        "card": str(checkpoint / "model.json"),
                    },
                    signature=SIGNATURE,
                    input_example=_example(card["transform"]["resize"]),
                    pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in _REQUIREMENTS],
                    registered_model_name=name,
                )
        version = str(info.registered_model_version)
        tags = _tags(card, data_fingerprint) | ({} if data_license is None else {"data.license": data_license})
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
        client.set_registered_model_alias(name, alias, version)
    except Exception as error:  # each kind of artifact store has errors of its own
        raise UserError(
            f"the model could not be registered in {shown(uri)}: {first_line(error, uri)} "
            f"The checkpoint is {checkpoint}."
        ) from error
    return Registered(name, version, alias)


def _example(side: int) -> pd.DataFrame:
    """One grey JPEG in base64, to show the input's form as a server takes it."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (128, 128, 128)).save(buffer, "JPEG")
    return pd.DataFrame({"image": [base64.b64encode(buffer.getvalue()).decode()]})


def _tags(card: dict[str, Any], data_fingerprint: str) -> dict[str, str]:
    """What a reader of the registry asks first: how good, measured how, trained on what."""
    metrics = card["metrics"]
    results = {key: metrics[key] for key in ("top1_correct", "top5_correct", "top5_k", "total")} if metrics else {}
    tags = {
        **results,
        "architecture": card["name"],
        "weights": card["weights"],
        "samples_seen": card["samples_seen"],
        "epoch": f"{card['epoch']:g}",
        "transform": json.dumps(card["transform"]),
        "data.fingerprint": data_fingerprint,
        "config_hash": card["config_hash"],
    }
    return {key: str(value) for key, value in tags.items()}
