"""The batch script of a run: `#SBATCH` lines and the command, followed by `train.sbatch`."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.allocation import InsufficientResources, Resources, allocate
from pipeline.config import Elastic
from pipeline.config_file import built_in_configs, load_config
from pipeline.derived import split_batch
from pipeline.errors import UserError
from pipeline.model.timm_models import check_model

_BODY = Path(__file__).parent / "train.sbatch"
_TIME = re.compile(
    r"(?P<d>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?|((?P<h>\d+):(?=\d+:))?(?P<m>\d+)(:(?P<s>\d+))?"
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]*")
_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class SlurmOptions:
    """Options of the batch script, most of which are options of sbatch.

    Attributes:
        nodes: Number of nodes.
        cpus_per_node: CPU cores on each node; None requests whole nodes.
        gpus_per_node: GPUs on each node.
        time: Time limit in a format of sbatch; None: the partition's default.
        partition: None: the site's default.
        account: None: the user's default.
        grace_s: Seconds between the signal for the last checkpoint and the time limit.
    """

    nodes: int
    cpus_per_node: int | None
    gpus_per_node: int
    time: str | None
    partition: str | None
    account: str | None
    grace_s: int


def render(path: Path, overrides: list[str], options: SlurmOptions) -> str:
    """Returns the batch script of a run; equal for equal input, working folder and environment.

    Raises:
        UserError: The nodes have too few resources for the config, or an option is invalid.
    """
    _check_options(options)
    config = load_config(path, *overrides)
    check_model(config)
    name = config.run.name
    if name is None or not _RUN_NAME.fullmatch(name):
        raise UserError(
            f"run.name={'null' if name is None else name} must be set to letters, digits, dots, hyphens and "
            f"underscores, for example run.name=first: a requeued job resumes the run of that name."
        )
    resources = _resources(options)
    if resources is not None:
        try:
            split_batch(config, allocate(config, resources).workers)
        except InsufficientResources as error:
            raise UserError(f"{error.reason}, or request more nodes with --nodes.") from error
    directives = [
        f"--job-name={name}",
        "--output=%x-%j.out",
        "--open-mode=append",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--nodes={options.nodes}",
        "--ntasks-per-node=1",
        *(
            ["--exclusive", "--mem=0"]
            if options.cpus_per_node is None
            else [f"--cpus-per-task={options.cpus_per_node}"]
        ),
        *([f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []),
        *(
            f"--{key}={value}"
            for key in ("time", "partition", "account")
            if (value := getattr(options, key)) is not None
        ),
        f"--signal=B:USR1@{options.grace_s}",
        "--requeue",
        *(["--no-kill"] if isinstance(config.cluster.workers, Elastic) else []),
    ]
    source = str(path) if path.as_posix() in built_in_configs() else str(path.resolve())
    lines = [
        "#!/bin/bash",
        f"# Trains {name}. Written by `densenet slurm render`; submit it with sbatch.",
        *(f"#SBATCH {directive}" for directive in directives),
        "",
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        f"train=({shlex.join(['densenet', 'train', source, *overrides])})",
        "",
    ]
    return "\n".join(lines) + "\n" + _BODY.read_text(encoding="utf-8")


def _resources(options: SlurmOptions) -> Resources | None:
    """Returns the cores and GPUs of all nodes, or None if the number of cores of a node is unknown."""
    nodes, cpus, gpus = options.nodes, options.cpus_per_node, options.gpus_per_node
    if cpus is None:
        return None
    name = f"--nodes={nodes} --cpus-per-node={cpus} --gpus-per-node={gpus}"
    return Resources(name, cpus * nodes, gpus * nodes, embedded=False)


def _check_options(options: SlurmOptions) -> None:
    for key, minimum in (("nodes", 1), ("cpus_per_node", 1), ("gpus_per_node", 0), ("grace_s", 1)):
        value = getattr(options, key)
        if value is not None and value < minimum:
            raise UserError(f"{_option(key)}={value} must be an integer of at least {minimum}.")
    for key in ("partition", "account"):
        value = getattr(options, key)
        if value is not None and not _NAME.fullmatch(value):
            raise UserError(
                f"{_option(key)}={value} is not a valid name: use letters, digits, dots, commas, hyphens and "
                f"underscores; `sinfo` lists the partitions, `sacctmgr show assoc` the accounts."
            )
    if options.time is not None:
        limit_s = _seconds(options.time)
        if limit_s is None:
            raise UserError(
                f"--time={options.time} is not a time limit: use minutes, HOURS:MINUTES:SECONDS or "
                f"DAYS-HOURS, for example --time=24:00:00 or --time=2-0."
            )
        if limit_s <= options.grace_s:
            raise UserError(
                f"--time={options.time} is {limit_s} s and must be longer than --grace={options.grace_s} s, the time "
                f"for the last checkpoint: set a longer --time or a shorter --grace."
            )


def _option(key: str) -> str:
    return "--" + key.removesuffix("_s").replace("_", "-")


def _seconds(time: str) -> int | None:
    """Returns the seconds of a time limit in a format of sbatch, or None if it has another format."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    hours, minutes, seconds = part["h"] + part["dh"], part["m"] + part["dm"], part["s"] + part["ds"]
    return ((part["d"] * 24 + hours) * 60 + minutes) * 60 + seconds
