"""The run's progress and results, and saving and loading of whole checkpoints."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import CheckpointIdentity, RunConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.order import ORDER_VERSION
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
from pipeline.train.storage import Storage, StorageError, checkpoint_storage
from pipeline.train.writer import CheckpointFiles, CheckpointWriter

_OPTIMIZER = "optimizer.safetensors"
_SAMPLE_ORDER: CheckpointIdentity = "sample order"
_FILES: dict[Weights, str] = {"raw": "model.safetensors", "ema": "ema.safetensors"}


@dataclass
class RunState:
    """The run's progress, and its best and last evaluation.

    Attributes:
        samples_seen: Training samples seen, over all workers.
        best: The best evaluation: most correct top-1 predictions, then lowest loss.
        best_at: Samples seen at the best evaluation.
        best_of: Its weights: `raw`, or `ema` where the moving average evaluated better.
        last: The last evaluation, of the better one of both weights.
        last_at: Samples seen at the last evaluation.
        last_of: Its weights, like `best_of`.
        non_finite_steps: Steps with a NaN or infinite loss that the run skipped or rewound.
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
        """Records the better one of the evaluations at this point; returns whether it is the run's best."""
        weights: Weights = "ema" if "ema" in results and results["ema"].better_than(results["raw"]) else "raw"
        self.last, self.last_at, self.last_of = results[weights], self.samples_seen, weights
        is_best = self.best is None or results[weights].better_than(self.best)
        if is_best:
            self.best, self.best_at, self.best_of = results[weights], self.samples_seen, weights
        return is_best


def save_checkpoint(
    engine: Engine,
    config: RunConfig,
    derived: Derived,
    state: RunState,
    train_index: DatasetIndex,
    writer: CheckpointWriter | None,
) -> None:
    """Copies the full state to the CPU (a collective); rank 0's writer writes it, other ranks have no writer."""
    tensors = {
        _FILES["raw"]: engine.full_state(),
        _FILES["ema"]: engine.ema_state(),
        _OPTIMIZER: engine.optimizer_state(),
    }
    if writer is None:
        return
    text = config.to_yaml()
    contents = CheckpointFiles(
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

    def keep(existing: list[Path]) -> list[Path]:
        kept = existing[-config.checkpoint.keep_last :]
        for previous, folder in zip([None, *existing], existing, strict=False):
            seen = checkpoint.samples_of(folder)
            before = checkpoint.samples_of(previous) if previous else 0
            if seen == best or (every and _epochs(seen, derived) // every > _epochs(before, derived) // every):
                kept.append(folder)
        return kept

    writer.write(checkpoint.folder_name(state.samples_seen), contents, keep)


def _epochs(samples: int, derived: Derived) -> int:
    return samples // derived.train_samples


def latest_checkpoint(config: RunConfig, run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Returns a run's latest valid checkpoint, or None (a collective: rank 0 finds it and broadcasts its name).

    With `checkpoint.storage`, each node downloads the checkpoint unless it has a valid copy.

    Raises:
        StorageError: the storage is unreachable, or a download is corrupt.
    """
    storage, root = checkpoint_storage(config), checkpoint_root(run_dir)
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        latest = _latest(root, storage, warn)
        found = [None if latest is None else latest.name]
    dist.broadcast_object_list(found)
    name = found[0]
    if name is None:
        return None
    reason = None if storage is None else storage.get(name, root)
    if reason is not None:
        raise StorageError(f"checkpoint {name} is corrupt after the download: {reason}")
    return root / name


def _latest(root: Path, storage: Storage | None, warn: Callable[[str], None]) -> Path | None:
    if storage is None:
        return checkpoint.latest_valid(root, warn)
    local = {folder.name for folder in checkpoint.checkpoints(root)}
    stored = set(storage.names())

    def check(folder: Path) -> str | None:
        reason = checkpoint.verify(folder)
        return storage.get(folder.name, root) if reason is not None and folder.name in stored else reason

    return checkpoint.first_valid((root / name for name in sorted(local | stored, reverse=True)), check, warn)


def restore_state(config: RunConfig, derived: Derived, train_index: DatasetIndex, folder: Path) -> RunState:
    """Reads the run's progress from a committed checkpoint, at any number of workers and ZeRO stage.

    Raises:
        UserError: the checkpoint belongs to another run, or has other values of settings that must not change.
    """
    record = read_state(folder)
    # Checkpoints from before the order had a version have the first one.
    saved, current = {_SAMPLE_ORDER: 1} | record["identity"], _identity(config, derived, train_index)
    allowed = config.checkpoint.allow_changed
    if saved[_SAMPLE_ORDER] != current[_SAMPLE_ORDER] and _SAMPLE_ORDER not in allowed:
        raise UserError(
            f"cannot resume from checkpoint {folder}: another release with another sample order wrote it (version "
            f"{saved[_SAMPLE_ORDER]}; this release has version {current[_SAMPLE_ORDER]}), so the rest of its epoch "
            f"would repeat some images and omit others. Finish the run with that release, or start a new run under "
            f"another run.name with model.weights={folder}. If repeated images are acceptable, as at the end of an "
            f"epoch, list '{_SAMPLE_ORDER}' in checkpoint.allow_changed."
        )
    changed = [
        f"{key} was {saved[key]} and is {current[key]}"
        for key in current
        if saved[key] != current[key] and key not in allowed
    ]
    if changed:
        raise UserError(
            f"cannot resume from checkpoint {folder}: {'; '.join(changed)}. Undo the change, start a new run under "
            f"another run.name (with model.weights={folder} from its weights), or list the key in "
            f"checkpoint.allow_changed if you know the change to be harmless."
        )
    known = {field.name: record[field.name] for field in fields(RunState)}
    known |= {key: EvalResult(**known[key]) for key in ("best", "last") if known[key]}
    return RunState(**known)


def create_engine(
    config: RunConfig,
    derived: Derived,
    device: torch.device,
    warn: Callable[[str], None],
    *,
    weights: Path | None = None,
    checkpoint: Path | None = None,
) -> Engine:
    """Creates an engine from a checkpoint, with pretrained weights, or with random weights from the run's seed."""
    torch.manual_seed(config.run.seed)
    model = create(config.model, derived.num_classes)
    if checkpoint is not None:
        load_weights(model, checkpoint / _FILES["raw"])
    elif weights is not None:
        load_weights(model, weights)
    engine = Engine(config, derived, model, device, warn)
    if checkpoint is not None:
        _load_optimizer_and_ema(engine, checkpoint)
    return engine


def _load_optimizer_and_ema(engine: Engine, folder: Path) -> None:
    """Loads optimizer state, EMA and loss scale; the model already has the checkpoint's weights."""
    engine.load_optimizer(folder / _OPTIMIZER)
    engine.load_ema(folder / _FILES["ema"])
    scaler = read_state(folder)["loss_scaler"]
    if engine.loss_scaler is not None and scaler is not None:
        engine.loss_scaler.load_state_dict(scaler)


def _identity(config: RunConfig, derived: Derived, train_index: DatasetIndex) -> dict[CheckpointIdentity, Any]:
    """Returns the settings that must not change when a run resumes from a checkpoint."""
    return {
        "model.name": config.model.name,
        "run.seed": config.run.seed,
        "optim.name": config.optim.name,
        "ema": "off" if config.ema.decay is None else "on",
        "train.global_batch_size": derived.global_batch_size,
        "classes": derived.num_classes,
        "training images": derived.train_samples,
        "data": train_index.fingerprint[:16],
        _SAMPLE_ORDER: ORDER_VERSION,
    }


def _model_card(config: RunConfig, derived: Derived, state: RunState, classes: tuple[str, ...], text: str) -> ModelCard:
    """Returns the model card for inference, see `pipeline.export.package`; `text` is the config as YAML."""
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
