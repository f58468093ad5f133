"""What there is of a run's checkpoints, for the tracking store."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.train.checkpoint import MANIFEST, checkpoint_root, checkpoints, read_state, samples_of


def checkpoint_records(config: RunConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Each checkpoint that is kept here, oldest first.

    `address` is its place in `checkpoint.storage` where there is one, else its folder; `sha256` is that of its
    manifest, which holds the hashes of its files; `top1`, `top5` (%) and `loss` are those of an evaluation made at it.
    """
    storage, records = config.checkpoint.storage, []
    newest_best = None
    for folder in checkpoints(checkpoint_root(run_dir)):
        try:
            state, manifest = read_state(folder), (folder / MANIFEST).read_bytes()
        except (OSError, ValueError):
            continue  # the writer has removed it meanwhile, or it is corrupt
        seen = samples_of(folder)
        newest_best = state["best_at"]
        address = str(folder) if storage is None else f"{storage.rstrip('/')}/{config.run.name}/{folder.name}"
        record = {"address": address, "samples_seen": seen, "sha256": hashlib.sha256(manifest).hexdigest()}
        if state["last_at"] == seen:
            last = state["last"]
            record |= {
                "top1": 100 * last["top1_correct"] / last["total"],
                "top5": 100 * last["top5_correct"] / last["total"],
                "loss": last["loss"],
                "weights": state["last_of"],
            }
        records.append(record)
    return [record | {"best": record["samples_seen"] == newest_best} for record in records]
