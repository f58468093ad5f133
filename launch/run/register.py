"""Registers a finished run's best checkpoint, and sends its unsent tracking records."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.errors import UserError
from pipeline.export.package import RegisteredModel
from pipeline.export.registration import reason_not_to_register, send_and_register
from pipeline.tracking.client import wait_for_stores
from pipeline.tracking.mlflow_sink import STATE
from pipeline.tracking.run import Tracker
from pipeline.tracking.stores import REGISTRY_VARIABLE, TRACKING_VARIABLE, Stores, redacted, stores_from_config
from pipeline.train import checkpoint
from pipeline.train.checkpoint import best_checkpoint, checkpoint_root
from pipeline.train.run_lock import folder_lock, run_lock
from pipeline.train.storage import fetch_checkpoints


def register_run(
    folder: Path, overrides: Sequence[str], log: Callable[[str], None], wait_timeout_s: float
) -> tuple[RegisteredModel, str]:
    """Registers the best checkpoint of a finished run; returns it, and the registry's URI.

    Raises:
        UserError: `folder` is not a run folder, has no checkpoint, or is being trained, or a store refuses the model.
    """
    config = run_config(folder, overrides)
    folder = folder.absolute()
    with folder_lock(folder):
        fetch_checkpoints(config, folder)
        if not checkpoint.checkpoints(checkpoint_root(folder)):
            raise UserError(f"{folder} has no checkpoint to register: train the run first.")
        reason = reason_not_to_register(best_checkpoint(folder))
        if reason is not None:
            raise UserError(f"the model of {folder} is not registered: {reason}. Train again with a lower optim.lr.")
        tracker = Tracker(config, folder, folder.name, log, running=False)
        try:
            registered = send_and_register(config, folder, tracker, log, wait_timeout_s)
        finally:
            tracker.close(wait_timeout_s)
    return registered, redacted(tracker.stores.registry)


def send_records(
    folder: Path, wait_timeout_s: float, log: Callable[[str], None], warn: Callable[[str], None]
) -> Tracker:
    """Sends a run's unsent records to its tracking store; returns the closed tracker.

    Raises:
        UserError: `folder` is not a run folder, or is being trained, or the store does not accept the records in time.
    """
    config = run_config(folder)
    uri = stores_from_config(config).tracking
    wait_for_stores(Stores(uri, uri), wait_timeout_s, warn)
    with run_lock(folder, config):
        tracker = Tracker(config, folder, str(config.run.name or folder.name), log, running=False)
        tracker.close(wait_timeout_s)
    if tracker.unsent:
        raise UserError(f"{redacted(tracker.uri)} did not accept {tracker.unsent} records within {wait_timeout_s:g} s.")
    return tracker


def run_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the config in a run folder, with overrides, and with the stores that the run used.

    Raises:
        UserError: `folder` is not a run folder, or an override is wrong.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml. Give a folder such as outputs/RUN.")
    config = load_config(folder / "config.yaml", *overrides)
    return config.model_copy(update={"tracking": config.tracking.model_copy(update=_store_uris(config, folder))})


def _store_uris(config: RunConfig, folder: Path) -> dict[str, str]:
    """Returns the URIs of the stores that the run used, unless its config or the environment sets them."""
    file = folder / STATE
    used = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if used.get("registry") == used.get("uri"):
        used.pop("registry", None)  # the default: the tracking store
    uris = {}
    for key, name, variable in (("uri", "uri", TRACKING_VARIABLE), ("registry_uri", "registry", REGISTRY_VARIABLE)):
        uri = used.get(name)
        if getattr(config.tracking, key) is None and not os.environ.get(variable) and uri and ":***@" not in uri:
            uris[key] = uri
    return uris
