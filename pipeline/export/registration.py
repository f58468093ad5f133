"""A run's best checkpoint becomes a registered model, where the registry takes it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.export.package import RegisteredModel, register
from pipeline.model.card import ModelCard
from pipeline.tracking.client import wait_for_stores
from pipeline.tracking.database import Unreachable
from pipeline.tracking.registry import check_permissions, move_alias, versions
from pipeline.tracking.run import Tracker
from pipeline.tracking.stores import redacted, stores_from_config
from pipeline.train import checkpoint
from pipeline.train.checkpoint import best_checkpoint

_RECORD = "registered.json"
_FINGERPRINT = "data.train.fingerprint"


def check_registry(config: RunConfig, told: Callable[[str], None]) -> None:
    """Looks whether the registry will take the run's model; one that is away is told with `on_unreachable=spool`.

    Raises:
        UserError: it refuses, or is away.
    """
    stores = stores_from_config(config)
    try:
        check_permissions(config.tracking.registered_model_name or config.model.name, stores)
    except Unreachable as error:
        if config.tracking.on_unreachable == "fail":
            raise
        if stores.separate_registry:
            told(f"{error} The registry at {redacted(stores.registry)} is needed at the end of the run.")


def reason_not_to_register(best: Path) -> str | None:
    """Why a checkpoint's model must not be registered, if there is a reason: its evaluation had non-finite outputs."""
    metrics = ModelCard.read(best).metrics
    if not metrics or not metrics.get("non_finite"):
        return None
    return f"it gives NaN or infinities for {metrics['non_finite']} of {metrics['total']} evaluation images"


def send_and_register(
    config: RunConfig, run_dir: Path, tracker: Tracker, told: Callable[[str], None], wait_timeout_s: float
) -> RegisteredModel:
    """Waits for the stores, sends what is left of the run's records, and registers its best checkpoint.

    Raises:
        UserError: a store does not answer in time, or refuses; the message says how to go on without training.
    """
    best = best_checkpoint(run_dir)
    try:
        wait_for_stores(tracker.stores, wait_timeout_s, told)
        if not tracker.flush(wait_timeout_s):
            raise UserError(f"MLflow at {redacted(tracker.uri)} does not take this run's records.")
        return _register(config, run_dir, tracker, best)
    except UserError as error:
        raise UserError(
            f"{error} The training is complete, its best checkpoint is {best}; `densenet models register {run_dir}` "
            f"registers it without training again (--as, --alias, --uri and --registry-uri name other places)."
        ) from error


def _register(config: RunConfig, run_dir: Path, tracker: Tracker, best: Path) -> RegisteredModel:
    """Registers the checkpoint, unless an earlier start of this run has done so, and moves the alias there."""
    record, stores = run_dir / _RECORD, tracker.stores
    name, alias = config.tracking.registered_model_name or config.model.name, config.tracking.alias
    registry = redacted(stores.registry)
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        model = RegisteredModel(**known["model"])
        if (known["checkpoint"], known.get("registry"), model.name) == (best.name, registry, name):
            there = [v for v in versions(name, stores) if v.version == model.version]
            if there and (alias in there[0].aliases or alias == model.alias):
                return RegisteredModel(name, model.version, alias)
            if there:
                move_alias(name, alias, model.version, stores)
                return _noted(record, best, registry, RegisteredModel(name, model.version, alias))
    registered = register(
        best,
        stores=stores,
        run_id=str(tracker.run_id),
        name=name,
        alias=alias,
        data_fingerprint=_fingerprint(tracker),
        data_license=config.data.license,
    )
    return _noted(record, best, registry, registered)


def _noted(record: Path, best: Path, registry: str, model: RegisteredModel) -> RegisteredModel:
    checkpoint.write_json(record, {"checkpoint": best.name, "registry": registry, "model": asdict(model)})
    return model


def _fingerprint(tracker: Tracker) -> str:
    """The training data's fingerprint, as the run has recorded it."""
    found = ""
    for record in tracker.journal.records():
        if record["kind"] == "tags":
            found = record["values"].get(_FINGERPRINT, found)
    return found
