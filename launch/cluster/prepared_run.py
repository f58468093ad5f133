"""A run that is ready to start, with the cluster resources for it."""

from dataclasses import dataclass

from launch.cluster.allocation import Allocation
from pipeline.train.setup import RunSetup


@dataclass(frozen=True, kw_only=True)
class PreparedRun(RunSetup):
    """A run that is ready to start, and its allocation of the cluster's resources."""

    allocation: Allocation
