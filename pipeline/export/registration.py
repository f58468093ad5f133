"""Registers a run's best checkpoint in the model registry."""

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
_FINGERPRINT, _LICENSE = "data.train.fingerprint", "data.license"


def check_registry(config: RunConfig, warn: Callable[[str], None]) -> None:
    """Checks that the registry accepts the run's model; warns if it is unreachable and `on_unreachable` is `spool`.

    Raises:
        UserError: The registry denies access, or is unreachable.
    """
    stores = stores_from_config(config)
    try:
        check_permissions(config.tracking.registered_model_name or config.model.name, stores)
    except Unreachable as error:
        if config.tracking.on_unreachable == "fail":
            raise
        if stores.separate_registry:
            warn(f"{error} The registry at {redacted(stores.registry)} is needed at the end of the run.")


def reason_not_to_register(best: Path) -> str | None:
    """Returns why a checkpoint must not be registered (non-finite outputs in its evaluation), or None."""
    metrics = ModelCard.read(best).metrics
    if not metrics or not metrics.get("non_finite"):
        return None
    return f"it outputs NaN or infinities for {metrics['non_finite']} of {metrics['total']} evaluation images"


def send_and_register(
    config: RunConfig, run_dir: Path, tracker: Tracker, warn: Callable[[str], None], wait_timeout_s: float
) -> RegisteredModel:
    """Waits for the stores, sends the remaining records of the run, and registers its best checkpoint.

    Raises:
        UserError: A store is still unreachable after the timeout, or rejects the model; the message has the command
            that registers the model later.
    """
    best = best_checkpoint(run_dir)
    try:
        wait_for_stores(tracker.stores, wait_timeout_s, warn)
        if not tracker.flush(wait_timeout_s):
            raise UserError(f"MLflow at {redacted(tracker.uri)} does not accept this run's records.")
        return _register(config, run_dir, tracker, best)
    except UserError as error:
        raise UserError(
            f"{error} The training is complete, its best checkpoint is {best}; `densenet models register {run_dir}` "
            f"registers it without training again (--as, --alias, --uri and --registry-uri select another name, alias "
            f"or store)."
        ) from error


def _register(config: RunConfig, run_dir: Path, tracker: Tracker, best: Path) -> RegisteredModel:
    """Registers the checkpoint, unless an earlier start of this run did, and moves the alias to it."""
    record, stores = run_dir / _RECORD, tracker.stores
    name, alias = config.tracking.registered_model_name or config.model.name, config.tracking.alias
    registry = redacted(stores.registry)
    if record.is_file():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        model = RegisteredModel(**earlier["model"])
        if (earlier["checkpoint"], earlier.get("registry"), model.name) == (best.name, registry, name):
            existing = [v for v in versions(name, stores) if v.version == model.version]
            if existing and (alias in existing[0].aliases or alias == model.alias):
                return RegisteredModel(name, model.version, alias)
            if existing:
                move_alias(name, alias, model.version, stores)
                return _save_record(record, best, registry, RegisteredModel(name, model.version, alias))
    registered = register(
        best,
        stores=stores,
        run_id=str(tracker.run_id),
        name=name,
        alias=alias,
        data_fingerprint=_tag(tracker, _FINGERPRINT) or "",
        data_license=config.data.license or _tag(tracker, _LICENSE),
    )
    return _save_record(record, best, registry, registered)


def _save_record(record: Path, best: Path, registry: str, model: RegisteredModel) -> RegisteredModel:
    checkpoint.write_json(record, {"checkpoint": best.name, "registry": registry, "model": asdict(model)})
    return model


def _tag(tracker: Tracker, key: str) -> str | None:
    """Returns the last value of one of the run's tags, or None."""
    value = None
    for record in tracker.journal.records():
        if record["kind"] == "tags":
            value = record["values"].get(key, value)
    return value
