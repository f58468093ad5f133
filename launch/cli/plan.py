"""`densenet plan`: prints the plan of a run, or a performance estimate for a hypothetical cluster."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.common.options import Address, AsJson, Config, Overrides
from launch.cli.common.output import console
from launch.cli.common.tables import print_table
from pipeline.errors import UserError

if TYPE_CHECKING:
    from launch.run.estimate import Estimate
    from pipeline.config import RunConfig

app = typer.Typer()


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    cluster: Annotated[
        str | None, typer.Option(help="estimate ImageNet training on NODESxGPUSxTYPE, for example 8x8xH100")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the resolved config and all derived values.

    Example: densenet plan densenet121 data.root=/data/imagenet
    """
    from launch.run import plan
    from launch.run.prepare import read_config

    run_config = read_config(config, overrides or [])
    if as_json and cluster is not None:
        raise UserError("--json prints the plan of a run, but the estimate of --cluster has no JSON form: omit one.")
    if cluster is not None:
        _print_estimate(run_config, cluster)
        return
    prepared = plan.plan(run_config, address)
    if as_json:
        print(json.dumps(plan.plan_as_dict(prepared), indent=2))
        return
    console.print(prepared.config.to_yaml(), highlight=False, markup=False, end="", soft_wrap=True)
    plan.print_plan(console, prepared)
    plan.print_warnings(console, prepared)


def _print_estimate(config: "RunConfig", cluster: str) -> None:
    """Prints the ImageNet estimate for the cluster, and for smaller and larger clusters of the same GPU type."""
    from launch.run.estimate import EFFICIENCY, HOP_S, IMAGENET, LAUNCH_S, estimate, scaling  # torch takes seconds
    from pipeline.formatting import duration

    e = estimate(config, cluster)
    d = e.derived
    stages = ", ".join(f"stage {stage}: {size / 1e9:.1f}" for stage, size in e.memory.items())
    console.rule("estimate, not a measurement", style="yellow")
    rows = [
        ("cluster", f"{e.nodes} nodes with {d.workers // e.nodes} {e.gpu_type} each, {d.workers} workers"),
        ("data", f"{IMAGENET[0]:,} training images of {IMAGENET[3] / 1e3:.0f} kB"),
        (
            "batch",
            f"{d.global_batch_size} = {d.device_batch_size} per device x {d.gradient_accumulation_steps} x {d.workers}",
        ),
        ("speed", f"{e.img_per_s:,.0f} img/s, {1000 * e.step_s:.1f} ms a step, bound by {e.bottleneck}"),
        ("communication", f"{e.communication:.0%} of a step"),
        ("an epoch", duration(e.epoch_s)),
        ("to the end", f"{duration(e.total_s)} for {config.train.epochs:g} epochs with their evaluations"),
        ("reading", f"{e.read_per_node / 1e6:,.0f} MB/s and {e.cores_per_node:.0f} cores of decoding per node"),
        ("a checkpoint", f"{e.checkpoint / 1e6:,.0f} MB"),
        ("memory", f"{stages} of {e.gpu.memory / 1e9:.0f} GB"),
        (
            "assumed",
            f"{EFFICIENCY:.0%} of peak and bandwidth, {LAUNCH_S * 1e6:g} us a kernel, {HOP_S * 1e6:g} us a hop",
        ),
    ]
    for name, text in rows:
        console.print(f"{name:14}{text}", markup=False, soft_wrap=True)
    _print_scaling(scaling(config, cluster))


def _print_scaling(estimates: "list[tuple[int, Estimate | None]]") -> None:
    from pipeline.formatting import duration

    rows: list[tuple[str, ...]] = []
    first: float | None = None
    for gpus, e in estimates:
        if e is None:
            rows.append((f"{gpus}", "the global batch cannot be divided among so many"))
            continue
        first = first or e.img_per_s
        rows.append(
            (
                f"{gpus}",
                f"{e.derived.device_batch_size} x {e.derived.gradient_accumulation_steps}",
                f"{e.img_per_s:,.0f}",
                f"{e.img_per_s / first / gpus:.0%}",
                f"{e.communication:.0%}",
                e.bottleneck,
                duration(e.epoch_s),
            )
        )
    print_table(console, ("GPUs", "batch per GPU", "img/s", "of linear", "communication", "bound by", "an epoch"), rows)
