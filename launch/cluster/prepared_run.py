"""What a cluster trains: a run that is ready to start, and what it takes of the cluster."""

from dataclasses import dataclass

from launch.cluster.allocation import Allocation
from pipeline.train.setup import RunSetup


@dataclass(frozen=True, kw_only=True)
class PreparedRun(RunSetup):
    """A run that is ready to start, and its share of what the cluster offers."""

    allocation: Allocation
