"""The list of a run's checkpoints for the tracking store."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.train.checkpoint import MANIFEST, checkpoint_root, checkpoints, read_state, samples_of


def checkpoint_records(config: RunConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Returns one record per local checkpoint, oldest first.

    `address` is the checkpoint's URI in `checkpoint.storage`, or its folder without such a storage. `sha256` is the
    hash of its manifest, which holds the hashes of its files. `top1`, `top5` (%) and `loss` are the evaluation at this
    checkpoint, where there was one.
    """
    storage, records = config.checkpoint.storage, []
    best_at = None
    for folder in checkpoints(checkpoint_root(run_dir)):
        try:
            state, manifest = read_state(folder), (folder / MANIFEST).read_bytes()
        except (OSError, ValueError):
            continue  # the writer has removed it since, or it is corrupt
        seen = samples_of(folder)
        best_at = state["best_at"]
        uri = str(folder) if storage is None else f"{storage.rstrip('/')}/{config.run.name}/{folder.name}"
        record = {"address": uri, "samples_seen": seen, "sha256": hashlib.sha256(manifest).hexdigest()}
        if state["last_at"] == seen:
            last = state["last"]
            record |= {
                "top1": 100 * last["top1_correct"] / last["total"],
                "top5": 100 * last["top5_correct"] / last["total"],
                "loss": last["loss"],
                "weights": state["last_of"],
            }
        records.append(record)
    return [record | {"best": record["samples_seen"] == best_at} for record in records]
