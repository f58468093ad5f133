"""What a run remembers besides the engine, and how a whole checkpoint is written and read."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pipeline.config import RunConfig
from pipeline.derived import Derived
from pipeline.errors import UserError
from pipeline.model.densenet import architecture
from pipeline.train import checkpoint
from pipeline.train.engine import Engine
from pipeline.train.evaluate import EvalResult

Weights = Literal["raw", "ema"]
_FILES: dict[Weights, str] = {"raw": "model.safetensors", "ema": "ema.safetensors"}


@dataclass
class RunState:
    """The run's clock, and its best and last evaluations.

    `best_at` is the clock of the best evaluation: the most top-1 hits, among equals the lowest loss. An evaluation is
    that of the better weights, of the raw ones and their moving average; `*_of` says which.
    """

    samples_seen: int = 0
    best: EvalResult | None = None
    best_at: int | None = None
    best_of: Weights = "raw"
    last: EvalResult | None = None
    last_at: int | None = None
    last_of: Weights = "raw"

    def record(self, results: dict[Weights, EvalResult]) -> bool:
        """Keeps the better one of the evaluations made now, and says whether it is the new best."""
        of: Weights = "ema" if "ema" in results and results["ema"].better_than(results["raw"]) else "raw"
        self.last, self.last_at, self.last_of = results[of], self.samples_seen, of
        is_best = self.best is None or results[of].better_than(self.best)
        if is_best:
            self.best, self.best_at, self.best_of = results[of], self.samples_seen, of
        return is_best


def checkpoint_root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save(
    engine: Engine, config: RunConfig, derived: Derived, state: RunState, classes: tuple[str, ...], run_dir: Path
) -> Path:
    """Writes a sealed checkpoint (a collective) and removes the ones that are no longer kept."""
    root = checkpoint_root(run_dir)
    folder = root / checkpoint.folder_name(state.samples_seen)
    partial = checkpoint.partial(folder)
    first = dist.get_rank() == 0
    if first:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial)
    weights: dict[Weights, dict[str, torch.Tensor]] = {"raw": engine.full_state(), "ema": engine.ema_state()}
    dist.barrier()
    if first:
        for kind, tensors in weights.items():
            if tensors:
                save_file(tensors, partial / _FILES[kind])
        checkpoint.write_json(partial / "model.json", _model_card(config, derived, state, classes))
        checkpoint.write_json(partial / "state.json", asdict(state) | {"identity": _identity(config, derived)})
        (partial / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        checkpoint.seal(folder)
        best = checkpoint.folder_name(state.best_at) if state.best_at is not None else None
        checkpoint.prune(root, config.checkpoint.keep_last, best)
    dist.barrier()
    return folder


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that verifies, if any (a collective: rank 0 looks and tells the others)."""
    found: list[Path | None] = [None]
    if dist.get_rank() == 0:
        found = [checkpoint.newest_valid(checkpoint_root(run_dir), warn)]
    dist.broadcast_object_list(found)
    return found[0]


def restore(engine: Engine, config: RunConfig, derived: Derived, folder: Path) -> RunState:
    """Reads a sealed checkpoint into the engine (a collective) and returns the run's state.

    Raises:
        UserError: the checkpoint is of another run, or was written under settings that cannot be changed.
    """
    record = read_state(folder)
    written, here = record["identity"], _identity(config, derived)
    changed = [f"{key} was {written[key]} and is {here[key]}" for key in here if written[key] != here[key]]
    if changed:
        raise UserError(
            f"checkpoint {folder} cannot be continued: {'; '.join(changed)}. "
            f"Undo the change, or start a new run under another run.name."
        )
    engine.load(folder)
    engine.load_ema(folder / _FILES["ema"])
    best, last = (EvalResult(**record[k]) if record[k] else None for k in ("best", "last"))
    return RunState(
        record["samples_seen"], best, record["best_at"], record["best_of"], last, record["last_at"], record["last_of"]
    )


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint of the best evaluation so far, as the newest checkpoint knows it."""
    root = checkpoint_root(run_dir)
    newest = checkpoint.checkpoints(root)[-1]
    return root / checkpoint.folder_name(read_state(newest)["best_at"])


def _identity(config: RunConfig, derived: Derived) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    return {
        "model.name": config.model.name,
        "run.seed": config.run.seed,
        "engine.zero_stage": config.engine.zero_stage,
        "optim.name": config.optim.name,
        "ema": "off" if config.ema.decay is None else "on",
        "train.global_batch_size": derived.global_batch_size,
        "workers": derived.workers,
        "classes": derived.num_classes,
        "training images": derived.train_samples,
    }


def _model_card(config: RunConfig, derived: Derived, state: RunState, classes: tuple[str, ...]) -> dict[str, Any]:
    """What the packaged model needs: see `pipeline.export.package`."""
    evaluated = state.last if state.last_at == state.samples_seen else None
    unused = [f"(unused {i})" for i in range(len(classes), derived.num_classes)]
    return {
        "name": config.model.name,
        "architecture": architecture(config.model),
        "num_classes": derived.num_classes,
        "classes": [*classes, *unused],
        "weights": _FILES[state.last_of if evaluated else "raw"],
        "transform": {
            "resize": config.eval.resize,
            "crop": config.eval.crop,
            "interpolation": config.eval.interpolation,
            "mean": config.data.mean,
            "std": config.data.std,
        },
        "metrics": asdict(evaluated) if evaluated else None,
        "samples_seen": state.samples_seen,
        "epoch": state.samples_seen / derived.train_samples,
        "config_hash": hashlib.sha256(config.to_yaml().encode()).hexdigest()[:16],
    }
