"""What a run remembers besides the engine, and how a whole checkpoint is written and read."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import CheckpointIdentity, RunConfig
from pipeline.data.index import DatasetIndex
from pipeline.derived import Derived
from pipeline.errors import UserError
from pipeline.evaluation.counts import EvalResult
from pipeline.model.card import CARD, ModelCard, Transform
from pipeline.model.densenet import create
from pipeline.model.timm_models import architecture
from pipeline.model.weights import load_weights
from pipeline.train import checkpoint
from pipeline.train.checkpoint import checkpoint_root, read_state
from pipeline.train.engine import Engine
from pipeline.train.events import Weights
from pipeline.train.storage import Storage, StorageError, storage_of
from pipeline.train.writer import Contents, Writer

_OPTIMIZER = "optimizer.safetensors"
_FILES: dict[Weights, str] = {"raw": "model.safetensors", "ema": "ema.safetensors"}


@dataclass
class RunState:
    """The run's clock, and its best and last evaluations.

    `best_at` is the clock of the best evaluation: the most top-1 hits, among equals the lowest loss. An evaluation is
    that of the better weights, of the raw ones and their moving average; `*_of` says which. `non_finite_steps` counts the steps
    whose loss was NaN or infinite and that the run got over.
    """

    samples_seen: int = 0
    best: EvalResult | None = None
    best_at: int | None = None
    best_of: Weights = "raw"
    last: EvalResult | None = None
    last_at: int | None = None
    last_of: Weights = "raw"
    non_finite_steps: int = 0

    def record(self, results: dict[Weights, EvalResult]) -> bool:
        """Keeps the better one of the evaluations made now, and says whether it is the new best."""
        of: Weights = "ema" if "ema" in results and results["ema"].better_than(results["raw"]) else "raw"
        self.last, self.last_at, self.last_of = results[of], self.samples_seen, of
        is_best = self.best is None or results[of].better_than(self.best)
        if is_best:
            self.best, self.best_at, self.best_of = results[of], self.samples_seen, of
        return is_best


def save(
    engine: Engine,
    config: RunConfig,
    derived: Derived,
    state: RunState,
    train_index: DatasetIndex,
    writer: Writer | None,
) -> None:
    """Takes a copy of everything (a collective), and lets rank 0's writer write it; other ranks have none."""
    tensors = {
        _FILES["raw"]: engine.full_state(),
        _FILES["ema"]: engine.ema_state(),
        _OPTIMIZER: engine.optimizer_state(),
    }
    if writer is None:
        return
    text = config.to_yaml()
    contents = Contents(
        tensors={name: values for name, values in tensors.items() if values},
        trees={
            "state.json": asdict(state)
            | {
                "identity": _identity(config, derived, train_index),
                "loss_scaler": engine.loss_scaler and engine.loss_scaler.state_dict(),
            },
        },
        texts={CARD: _model_card(config, derived, state, train_index.classes, text).to_json(), "config.yaml": text},
    )
    best, every = state.best_at, config.checkpoint.keep_every_epochs

    def keep(there: list[Path]) -> list[Path]:
        kept = there[-config.checkpoint.keep_last :]
        for earlier, folder in zip([None, *there], there, strict=False):
            seen = checkpoint.samples_of(folder)
            before = checkpoint.samples_of(earlier) if earlier else 0
            if seen == best or (every and _epochs(seen, derived) // every > _epochs(before, derived) // every):
                kept.append(folder)
        return kept

    writer.write(checkpoint.folder_name(state.samples_seen), contents, keep)


def _epochs(samples: int, derived: Derived) -> int:
    return samples // derived.train_samples


def newest_checkpoint(config: RunConfig, run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that verifies, if any (a collective: rank 0 looks and tells the others).

    Where copies are kept in a second place, each node gets the checkpoint from there unless it has it.
    """
    storage, root = storage_of(config), checkpoint_root(run_dir)
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        newest = _newest(root, storage, warn)
        found = [None if newest is None else newest.name]
    dist.broadcast_object_list(found)
    name = found[0]
    if name is None:
        return None
    reason = None if storage is None else storage.get(name, root)
    if reason is not None:
        raise StorageError(f"checkpoint {name} came corrupt: {reason}")
    return root / name


def _newest(root: Path, storage: Storage | None, warn: Callable[[str], None]) -> Path | None:
    if storage is None:
        return checkpoint.newest_valid(root, warn)
    local = {folder.name for folder in checkpoint.checkpoints(root)}
    stored = set(storage.names())

    def check(folder: Path) -> str | None:
        reason = checkpoint.verify(folder)
        return storage.get(folder.name, root) if reason is not None and folder.name in stored else reason

    return checkpoint.first_valid((root / name for name in sorted(local | stored, reverse=True)), check, warn)


def resumed(config: RunConfig, derived: Derived, train_index: DatasetIndex, folder: Path) -> RunState:
    """The state of the run in a committed checkpoint, of this or another number of workers and ZeRO stage.

    Raises:
        UserError: the checkpoint is of another run, or was written under settings that cannot be changed.
    """
    record = read_state(folder)
    written, here = record["identity"], _identity(config, derived, train_index)
    allowed = config.checkpoint.allow_changed
    changed = [
        f"{key} was {written[key]} and is {here[key]}"
        for key in here
        if written[key] != here[key] and key not in allowed
    ]
    if changed:
        raise UserError(
            f"checkpoint {folder} cannot be continued: {'; '.join(changed)}. Undo the change, start a new run under "
            f"another run.name, or, where you know it to be harmless, name it in checkpoint.allow_changed."
        )
    known = {field.name: record[field.name] for field in fields(RunState)}
    known |= {key: EvalResult(**known[key]) for key in ("best", "last") if known[key]}
    return RunState(**known)


def new_engine(
    config: RunConfig,
    derived: Derived,
    device: torch.device,
    warn: Callable[[str], None],
    *,
    weights: Path | None = None,
    checkpoint: Path | None = None,
) -> Engine:
    """An engine with the weights and all else of a checkpoint, or with weights from elsewhere, or new ones."""
    torch.manual_seed(config.run.seed)
    model = create(config.model, derived.num_classes)
    if checkpoint is not None:
        load_weights(model, checkpoint / _FILES["raw"])
    elif weights is not None:
        load_weights(model, weights)
    engine = Engine(config, derived, model, device, warn)
    if checkpoint is not None:
        _load_into(engine, checkpoint)
    return engine


def _load_into(engine: Engine, folder: Path) -> None:
    """Gives the engine, whose model has the checkpoint's weights already, what else it needs to go on."""
    engine.load_optimizer(folder / _OPTIMIZER)
    engine.load_ema(folder / _FILES["ema"])
    scaler = read_state(folder)["loss_scaler"]
    if engine.loss_scaler is not None and scaler is not None:
        engine.loss_scaler.load_state_dict(scaler)


def _identity(config: RunConfig, derived: Derived, train_index: DatasetIndex) -> dict[CheckpointIdentity, Any]:
    """What must be the same for a checkpoint to be continued."""
    return {
        "model.name": config.model.name,
        "run.seed": config.run.seed,
        "optim.name": config.optim.name,
        "ema": "off" if config.ema.decay is None else "on",
        "train.global_batch_size": derived.global_batch_size,
        "classes": derived.num_classes,
        "training images": derived.train_samples,
        "data": train_index.fingerprint[:16],
    }


def _model_card(config: RunConfig, derived: Derived, state: RunState, classes: tuple[str, ...], text: str) -> ModelCard:
    """What the packaged model needs, see `pipeline.export.package`; `text` is the config as YAML."""
    evaluated = state.last if state.last_at == state.samples_seen else None
    unused = [f"(unused {i})" for i in range(len(classes), derived.num_classes)]
    return ModelCard(
        name=config.model.name,
        architecture=architecture(config.model),
        num_classes=derived.num_classes,
        classes=(*classes, *unused),
        weights=_FILES[state.last_of if evaluated else "raw"],
        transform=Transform(
            resize=config.eval.resize,
            crop=config.eval.crop,
            interpolation=config.eval.interpolation,
            mean=config.data.mean,
            std=config.data.std,
        ),
        max_pixels=config.data.max_pixels,
        metrics=asdict(evaluated) if evaluated else None,
        samples_seen=state.samples_seen,
        epoch=state.samples_seen / derived.train_samples,
        config_hash=hashlib.sha256(text.encode()).hexdigest()[:16],
    )
