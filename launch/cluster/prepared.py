"""What a cluster trains: a run that is ready to start, and the file by which nodes know its folder."""

from dataclasses import dataclass
from pathlib import Path

from launch.cluster.capacity import Share
from pipeline.config import RunConfig
from pipeline.data.index import DatasetIndex
from pipeline.derived import Derived
from pipeline.model.sources import Sources

PROBE = "config.yaml"  # in the run's folder, of the driver's making: a node that does not see it has another folder


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start.

    `start` tells what its weights are at first; `resume` is another run's checkpoint to go on from, if any.
    """

    config: RunConfig
    derived: Derived
    share: Share
    train_index: DatasetIndex
    val_index: DatasetIndex
    sources: Sources
    start: str
    resume: Path | None
    warnings: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The run's folder, `run.output`/`run.name`."""
        return Path(self.config.run.output) / str(self.config.run.name)
