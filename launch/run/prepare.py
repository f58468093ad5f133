"""What is settled on the driver before any worker starts: the config here, resources, and the run's setup."""

from pathlib import Path

from launch.cluster.allocation import Resources, allocate
from launch.cluster.job_env import base_folder
from launch.cluster.prepared_run import PreparedRun
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.model.timm_models import check_model
from pipeline.train.setup import absolute, check_writable, new_name, set_up


def named_config(path: Path, overrides: list[str]) -> RunConfig:
    """Loads a config, and gives the run its name."""
    config = load_config(path, *overrides)
    check_model(config)
    name = config.run.name or new_name(path.stem)
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def read_config(path: Path, overrides: list[str]) -> RunConfig:
    """Loads a config, gives the run its name, and makes its paths absolute on this machine."""
    return absolute(named_config(path, overrides), base_folder())


def prepare(config: RunConfig, offered: Resources, resume: str | None = None) -> PreparedRun:
    """Checks the output folder, takes a share of the resources and sets the run up, see `pipeline.train.setup`.

    Raises:
        UserError: anything that would stop the run later and can be known now.
    """
    check_writable(Path(config.run.output))
    taken = allocate(config, offered)
    setup = set_up(
        config,
        device=taken.device,
        workers=taken.workers,
        cpus_per_worker=taken.cpus_per_worker,
        embedded=offered.embedded,
        resume=resume,
        warnings=taken.warnings,
    )
    return PreparedRun(**vars(setup), allocation=taken)
