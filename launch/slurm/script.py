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
class Allocation:
    """The resources that sbatch requests.

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


def render(path: Path, overrides: list[str], asked: Allocation) -> str:
    """Returns the batch script of a run; deterministic for the same input, working folder and environment.

    Raises:
        UserError: the config does not fit the nodes, or an option is wrong.
    """
    _check_options(asked)
    config = load_config(path, *overrides)
    check_model(config)
    name = str(config.run.name)
    if config.run.name is None or not _RUN_NAME.fullmatch(name):
        raise UserError(
            f"run.name={config.run.name} must be set, because a requeued job resumes the run of that name, and "
            f"be a name for the job and its files: use letters, digits, dots, hyphens and underscores, for example "
            f"run.name=first."
        )
    offered = _offered(asked)
    if offered is not None:
        try:
            split_batch(config, allocate(config, offered).workers)
        except InsufficientResources as error:
            raise UserError(f"{error.reason}, or ask for more with --nodes.") from error
    options = [
        f"--job-name={name}",
        "--output=%x-%j.out",
        "--open-mode=append",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--nodes={asked.nodes}",
        "--ntasks-per-node=1",
        *(["--exclusive", "--mem=0"] if asked.cpus_per_node is None else [f"--cpus-per-task={asked.cpus_per_node}"]),
        *([f"--gpus-per-node={asked.gpus_per_node}"] if asked.gpus_per_node else []),
        *(f"--{key}={value}" for key in ("time", "partition", "account") if (value := getattr(asked, key)) is not None),
        f"--signal=B:USR1@{asked.grace_s}",
        "--requeue",
        *(["--no-kill"] if isinstance(config.cluster.workers, Elastic) else []),
    ]
    source = str(path) if path.as_posix() in built_in_configs() else str(path.resolve())
    lines = [
        "#!/bin/bash",
        f"# Trains {name} on {asked.nodes} nodes. Written by `densenet slurm render`; submit it with sbatch.",
        *(f"#SBATCH {option}" for option in options),
        "",
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        f"train=({shlex.join(['densenet', 'train', source, *overrides])})",
        "",
    ]
    return "\n".join(lines) + "\n" + _BODY.read_text(encoding="utf-8")


def _offered(asked: Allocation) -> Resources | None:
    """The cores and GPUs of all nodes; None where the cores of a node are not known."""
    if asked.cpus_per_node is None:
        return None
    nodes, cpus, gpus = asked.nodes, asked.cpus_per_node, asked.gpus_per_node
    where = f"--nodes={nodes} --cpus-per-node={cpus} --gpus-per-node={gpus}"
    return Resources(where, cpus * nodes, gpus * nodes, embedded=False)


def _check_options(asked: Allocation) -> None:
    for key, least in (("nodes", 1), ("cpus_per_node", 1), ("gpus_per_node", 0), ("grace_s", 1)):
        value = getattr(asked, key)
        if value is not None and value < least:
            raise UserError(f"{_option(key)}={value} must be a whole number of at least {least}.")
    for key in ("partition", "account"):
        value = getattr(asked, key)
        if value is not None and not _NAME.fullmatch(value):
            raise UserError(
                f"{_option(key)}={value} is not a valid name: use letters, digits, dots, hyphens and underscores; "
                f"`sinfo` lists partitions, `sacctmgr show assoc` accounts."
            )
    if asked.time is not None:
        limit_s = _seconds(asked.time)
        if limit_s is None:
            raise UserError(
                f"--time={asked.time} is not a time limit that sbatch accepts: use minutes, HOURS:MINUTES:SECONDS or "
                f"DAYS-HOURS, for example --time=24:00:00 or --time=2-0."
            )
        if limit_s <= asked.grace_s:
            raise UserError(
                f"--time={asked.time} is {limit_s} s, and --grace={asked.grace_s} s of them are for the last "
                f"checkpoint: set a longer --time or a shorter --grace."
            )


def _option(key: str) -> str:
    return "--" + key.removesuffix("_s").replace("_", "-")


def _seconds(time: str) -> int | None:
    """The seconds of a time limit as sbatch takes it, or None where it does not."""
    found = _TIME.fullmatch(time)
    if found is None:
        return None
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    hours, minutes, seconds = part["h"] + part["dh"], part["m"] + part["dm"], part["s"] + part["ds"]
    return ((part["d"] * 24 + hours) * 60 + minutes) * 60 + seconds
