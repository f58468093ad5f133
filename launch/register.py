"""A finished run's best checkpoint becomes a registered model: at the end of its training, or by a command later."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from launch.claim import locked
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.errors import UserError
from pipeline.export.package import Registered, register
from pipeline.model.sources import read_card
from pipeline.tracking.mlflow_sink import STATE
from pipeline.tracking.registry import move_alias, versions
from pipeline.tracking.run import Tracker
from pipeline.tracking.store import wait_for
from pipeline.tracking.stores import REGISTRY_VARIABLE, TRACKING_VARIABLE, shown
from pipeline.train import checkpoint
from pipeline.train.checkpoint import best_checkpoint, checkpoint_root
from pipeline.train.storage import fetch

_RECORD = "registered.json"
_FINGERPRINT = "data.train.fingerprint"


def register_command(
    console: Console,
    folder: Path,
    name: str | None,
    alias: str | None,
    uri: str | None,
    registry_uri: str | None,
    patience_s: float,
) -> None:
    """Registers the best checkpoint of a run that was trained before; what is None is as in the run's config.

    Raises:
        UserError: it is no run's folder, has no checkpoint, is being trained, or a store refuses it.
    """
    given = {"register_as": name, "alias": alias, "uri": uri, "registry_uri": registry_uri}
    config = run_config(folder, [f"tracking.{key}={value}" for key, value in given.items() if value is not None])
    folder = folder.absolute()
    with locked(folder):
        fetch(config, folder)
        if not checkpoint.checkpoints(checkpoint_root(folder)):
            raise UserError(f"{folder} has no checkpoint to register: train the run first.")
        reason = not_a_candidate(best_checkpoint(folder))
        if reason is not None:
            raise UserError(f"the model of {folder} is not registered: {reason}. Train again with a lower optim.lr.")
        tracker = Tracker(config, folder, folder.name, console.print, running=False)
        try:
            registered = send_and_register(config, folder, tracker, console.print, patience_s)
        finally:
            tracker.close(patience_s)
    where = shown(tracker.stores.registry)
    console.print(
        f"{registered.name} version {registered.version} in {where}, alias {registered.alias} ({registered.uri})",
        soft_wrap=True,
        markup=False,
    )


def run_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run's folder, with overrides, and the stores that it has used.

    Raises:
        UserError: it is none, or an override is wrong.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run's folder: it has no config.yaml. Give one as outputs/RUN.")
    config = load_config(folder / "config.yaml", overrides)
    return config.model_copy(update={"tracking": config.tracking.model_copy(update=_addresses(config, folder))})


def _addresses(config: RunConfig, folder: Path) -> dict[str, str]:
    """The stores that the run has used, where neither its config nor this environment names others."""
    file = folder / STATE
    used = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if used.get("registry") == used.get("uri"):
        used.pop("registry", None)  # it follows the tracking store
    found = {}
    for key, kept, variable in (("uri", "uri", TRACKING_VARIABLE), ("registry_uri", "registry", REGISTRY_VARIABLE)):
        place = used.get(kept)
        if getattr(config.tracking, key) is None and not os.environ.get(variable) and place and ":***@" not in place:
            found[key] = place
    return found


def not_a_candidate(best: Path) -> str | None:
    """Why a checkpoint's model must not be registered, if there is a reason: its evaluation had non-finite outputs."""
    metrics = read_card(best)["metrics"]
    if not metrics or not metrics.get("non_finite"):
        return None
    return f"it gives NaN or infinities for {metrics['non_finite']} of {metrics['total']} evaluation images"


def send_and_register(
    config: RunConfig, run_dir: Path, tracker: Tracker, told: Callable[[str], None], patience_s: float
) -> Registered:
    """Waits for the stores, sends what is left of the run's records, and registers its best checkpoint.

    Raises:
        UserError: a store does not answer in time, or refuses; the message says how to go on without training.
    """
    best = best_checkpoint(run_dir)
    try:
        wait_for(tracker.stores, patience_s, told)
        if not tracker.flush(patience_s):
            raise UserError(f"MLflow at {shown(tracker.uri)} does not take this run's records.")
        return _register(config, run_dir, tracker, best)
    except UserError as error:
        raise UserError(
            f"{error} The training is complete, its best checkpoint is {best}; `densenet models register {run_dir}` "
            f"registers it without training again (--as, --alias, --uri and --registry-uri name other places)."
        ) from error


def _register(config: RunConfig, run_dir: Path, tracker: Tracker, best: Path) -> Registered:
    """Registers the checkpoint, unless an earlier start of this run has done so, and moves the alias there."""
    record, stores = run_dir / _RECORD, tracker.stores
    name, alias = config.tracking.register_as or config.model.name, config.tracking.alias
    registry = shown(stores.registry)
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        model = Registered(**known["model"])
        if (known["checkpoint"], known.get("registry"), model.name) == (best.name, registry, name):
            there = [v for v in versions(name, stores) if v.version == model.version]
            if there and (alias in there[0].aliases or alias == model.alias):
                return Registered(name, model.version, alias)
            if there:
                move_alias(name, alias, model.version, stores)
                return _noted(record, best, registry, Registered(name, model.version, alias))
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


def _noted(record: Path, best: Path, registry: str, model: Registered) -> Registered:
    checkpoint.write_json(record, {"checkpoint": best.name, "registry": registry, "model": asdict(model)})
    return model


def _fingerprint(tracker: Tracker) -> str:
    """The training data's fingerprint, as the run has recorded it."""
    found = ""
    for record in tracker.journal.records():
        if record["kind"] == "tags":
            found = record["values"].get(_FINGERPRINT, found)
    return found
