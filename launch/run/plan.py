"""The plan of a run: its config, derived values and warnings, before anything starts."""

from pathlib import Path
from typing import Any

from rich.console import Console

from launch.cluster.allocation import machine_resources
from launch.cluster.ports import cluster_address
from launch.cluster.prepared_run import PreparedRun
from launch.run.prepare import prepare
from pipeline.config import RunConfig
from pipeline.derived import Derived
from pipeline.model.timm_models import size
from pipeline.tracking.stores import redacted, stores_from_config
from pipeline.train.setup import check_writable


def plan(config: RunConfig, address: str | None) -> PreparedRun:
    """Prepares a run as `densenet train` does, and starts nothing; reads the resources of the cluster at `address`.

    Raises:
        UserError: Anything that would stop the run, or an unreachable cluster.
    """
    address = cluster_address(address)
    if address is None:
        return prepare(config, machine_resources())
    from launch.cluster.connect import cluster_resources, connected_ray  # Ray takes seconds to import

    output = Path(config.run.output)
    check_writable(output)
    with connected_ray(address, output / "ray.log"):
        return prepare(config, cluster_resources(address))


def plan_as_dict(prepared: PreparedRun) -> dict[str, Any]:
    """Returns the whole plan, for JSON."""
    return {
        "config": prepared.config.model_dump(mode="json"),
        "derived": prepared.derived.model_dump(mode="json"),
        "stores": _stores(prepared.config),
        "start": prepared.initial_weights,
        "warnings": prepared.warnings,
    }


def print_plan(console: Console, prepared: PreparedRun) -> None:
    """Prints the derived values, one per line."""
    config, d = prepared.config, prepared.derived
    model = size(config.model, d.num_classes, config.data.image_size)
    rows = [
        ("run", f"{config.run.name} in {prepared.run_dir}"),
        (
            "model",
            f"{config.model.name}, {model.parameters:,} parameters, {d.num_classes} classes, "
            f"{model.multiply_adds / 1e9:.3g} G multiply-adds at {config.data.image_size} pixels",
        ),
        ("weights", prepared.initial_weights),
        ("data", f"{d.train_samples:,} training and {d.val_samples:,} evaluation images in {config.data.root}"),
        ("workers", f"{d.workers} on {d.device}, {d.cpus_per_worker} CPU cores each"),
        (
            "global batch",
            f"{d.global_batch_size} = {d.device_batch_size} per device x {d.gradient_accumulation_steps} accumulated "
            f"x {d.workers} workers",
        ),
        (
            "steps",
            f"{d.total_steps:,} in all = {config.train.epochs:g} epochs of {d.steps_per_epoch:,.2f}, "
            f"{d.total_samples:,} samples",
        ),
        ("peak LR", _learning_rate(config, d)),
        ("precision", f"{d.precision}, ZeRO stage {d.zero_stage}"),
        ("evaluation", config.eval.description),
        *_stores(config).items(),
    ]
    if prepared.pretrained.teacher is not None:
        rows.append(("teacher", str(prepared.pretrained.teacher)))
    for name, text in rows:
        console.print(f"{name:13}{text}", markup=False, soft_wrap=True)


def _stores(config: RunConfig) -> dict[str, str]:
    """Returns the tracking store of the run, and the registry of its model."""
    stores, tracking = stores_from_config(config), config.tracking
    model = f"{tracking.registered_model_name or config.model.name}@{tracking.alias}"
    return {
        "tracking": f"experiment {tracking.experiment} in {redacted(stores.tracking)}",
        "registry": f"{model} in {redacted(stores.registry)}",
    }


def print_warnings(console: Console, prepared: PreparedRun) -> None:
    """Prints the warnings."""
    for warning in prepared.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _learning_rate(config: RunConfig, d: Derived) -> str:
    optim, schedule = config.optim, config.schedule
    scaled = ""
    if optim.lr_scaling != "none":
        ratio = f"{d.global_batch_size} / {optim.lr_base_batch}"
        scaled = f" = {optim.lr:g} x {ratio if optim.lr_scaling == 'linear' else f'sqrt({ratio})'}"
    warmup = f", after {schedule.warmup_epochs:g} epochs of warmup" if schedule.warmup_epochs else ""
    return f"{d.peak_lr:g}{scaled}, {optim.name}, schedule {schedule.name}{warmup}"
