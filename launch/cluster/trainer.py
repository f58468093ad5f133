"""Ray Train's trainer for the local Ray of one run."""

from typing import Any

from ray.train import Result
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_OF_CLUSTERS = (DatasetsCallback, PlacementGroupCleanerCallback)


class LocalTrainer(DataParallelTrainer):
    """A trainer for the local Ray of one run.

    It omits the actors that Ray Train uses for Ray Data and for the autoscaler, and the one that removes the placement
    group of a lost controller: each is a process that takes more than a second to start, before the first step.
    """

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        settings["callbacks"] = [c for c in settings["callbacks"] if not isinstance(c, _OF_CLUSTERS)]
        if isinstance(settings["scaling_policy"], FixedScalingPolicy):
            settings["scaling_policy"] = _FixedOnOneNode(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)


class _FixedOnOneNode(FixedScalingPolicy):
    """A fixed number of workers, without requests to an autoscaler."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass
