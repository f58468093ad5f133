"""`densenet plan`: everything that a run will do, before it does anything."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.net import cluster_address
from launch.prepare import Prepared, check_writable, prepare, read_config
from launch.resources import this_machine
from pipeline.config import RunConfig
from pipeline.derived import Derived
from pipeline.errors import UserError
from pipeline.model.nets import size
from pipeline.tracking.stores import shown, stores_of


def plan_command(
    console: Console,
    path: Path,
    overrides: list[str],
    address: str | None,
    cluster: str | None = None,
    as_json: bool = False,
) -> None:
    """Prints the resolved config and what follows from it; starts nothing but a look at the cluster.

    With `cluster`, estimates the run on such a cluster instead.
    """
    config = read_config(path, overrides)
    if as_json and cluster is not None:
        raise UserError("--json is for what a run will do; the estimate of --cluster is for people: leave one out.")
    if cluster is not None:
        from launch.estimate import print_estimate

        print_estimate(console, config, cluster)
        return
    address = cluster_address(address)
    if address is None:
        prepared = prepare(config, this_machine())
    else:
        from launch.cluster import joined, offered_by_cluster  # Ray takes seconds to import

        output = Path(config.run.output)
        check_writable(output)
        with joined(address, output / "ray.log"):
            prepared = prepare(config, offered_by_cluster(address))
    if as_json:
        told: dict[str, Any] = {"config": prepared.config.model_dump(mode="json")}
        told |= {"derived": prepared.derived.model_dump(mode="json"), "stores": _stores(prepared.config)}
        print(json.dumps(told | {"start": prepared.start, "warnings": prepared.warnings}, indent=2))
        return
    console.print(prepared.config.to_yaml(), highlight=False, markup=False, end="", soft_wrap=True)
    print_plan(console, prepared)
    print_warnings(console, prepared)


def print_plan(console: Console, prepared: Prepared) -> None:
    """Prints the derived values, one a line."""
    config, d = prepared.config, prepared.derived
    model = size(config.model, d.num_classes, config.data.image_size)
    rows = [
        ("run", f"{config.run.name} in {prepared.run_dir}"),
        (
            "model",
            f"{config.model.name}, {model.parameters:,} parameters, {d.num_classes} classes, "
            f"{model.multiply_adds / 1e9:.3g} G multiply-adds at {config.data.image_size} pixels",
        ),
        ("weights", prepared.start),
        ("data", f"{d.train_samples:,} training and {d.val_samples:,} evaluation images in {config.data.root}"),
        ("workers", f"{d.workers} on {d.device}, {d.cpus_per_worker} CPU cores each"),
        (
            "global batch",
            f"{d.global_batch_size} = {d.device_batch_size} per device x {d.accumulation} accumulated "
            f"x {d.workers} workers",
        ),
        (
            "steps",
            f"{d.total_steps:,} in all = {config.train.epochs:g} epochs of {d.steps_per_epoch:,.2f}, "
            f"{d.total_samples:,} samples",
        ),
        ("peak rate", _learning_rate(config, d)),
        ("precision", f"{d.precision}, ZeRO stage {d.zero_stage}"),
        ("evaluation", config.eval.description),
        *_stores(config).items(),
    ]
    if prepared.sources.teacher is not None:
        rows.append(("teacher", str(prepared.sources.teacher)))
    for name, text in rows:
        console.print(f"{name:13}{text}", markup=False, soft_wrap=True)


def _stores(config: RunConfig) -> dict[str, str]:
    """Where the run is recorded, and where its model is registered."""
    stores, tracking = stores_of(config), config.tracking
    model = f"{tracking.register_as or config.model.name}@{tracking.alias}"
    return {
        "tracking": f"experiment {tracking.experiment} in {shown(stores.tracking)}",
        "registry": f"{model} in {shown(stores.registry)}",
    }


def print_warnings(console: Console, prepared: Prepared) -> None:
    """Prints what the user may not have meant."""
    for warning in prepared.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _learning_rate(config: RunConfig, d: Derived) -> str:
    optim, schedule = config.optim, config.schedule
    scaled = ""
    if optim.lr_scaling != "none":
        ratio = f"{d.global_batch_size} / {optim.lr_base_batch}"
        scaled = f" = {optim.lr:g} x {ratio if optim.lr_scaling == 'linear' else f'sqrt({ratio})'}"
    warmup = f", after {schedule.warmup_epochs:g} epochs of warm-up" if schedule.warmup_epochs else ""
    return f"{d.peak_lr:g}{scaled}, {optim.name}, schedule {schedule.name}{warmup}"
