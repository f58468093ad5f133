"""Prepares a run on the driver, before any worker starts: config, resources and setup."""

from pathlib import Path

from launch.cluster.allocation import Resources, allocate
from launch.cluster.job_env import base_folder
from launch.cluster.prepared_run import PreparedRun
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.model.timm_models import check_model
from pipeline.train.setup import check_writable, new_run_name, set_up, with_absolute_paths


def load_named_config(path: Path, overrides: list[str]) -> RunConfig:
    """Loads a config, and sets `run.name` if it is missing."""
    config = load_config(path, *overrides)
    check_model(config)
    name = config.run.name or new_run_name(path.stem)
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def read_config(path: Path, overrides: list[str]) -> RunConfig:
    """Loads a config, sets `run.name` if it is missing, and makes its paths absolute on this machine."""
    return with_absolute_paths(load_named_config(path, overrides), base_folder())


def prepare(config: RunConfig, available: Resources, resume: str | None = None) -> PreparedRun:
    """Checks the output folder, allocates resources and sets the run up, see `pipeline.train.setup`.

    Raises:
        UserError: Anything that would stop the run later and can be known now.
    """
    check_writable(Path(config.run.output))
    allocation = allocate(config, available)
    setup = set_up(
        config,
        device=allocation.device,
        workers=allocation.workers,
        cpus_per_worker=allocation.cpus_per_worker,
        embedded=available.embedded,
        resume=resume,
        warnings=allocation.warnings,
    )
    return PreparedRun(**vars(setup), allocation=allocation)
