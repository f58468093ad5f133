"""What a cluster trains: a run that is ready to start, and what it takes of the cluster."""

from dataclasses import dataclass

from launch.cluster.capacity import Share
from pipeline.train.setup import RunSetup


@dataclass(frozen=True, kw_only=True)
class Prepared(RunSetup):
    """A run that is ready to start, and its share of what the cluster offers."""

    share: Share
