"""Imports what a process of a training run needs, when Ray starts the process: every process imports this module.

The imports take seconds, in which the driver prepares the run. Environment variables tell what the process will be.
"""

import gc
import importlib
import os

DEVICE = "DENSENET_PRELOAD"  # set for training workers: the run's device
CONTROLLER = "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"  # Ray Train sets it for its controller and the controller's actors
_OF_WORKERS = ("ray.train.torch", "launch.cluster.worker", "pipeline.train.rank")
_OF_CONTROLLER = ("launch.cluster.process_group", "launch.cluster.worker", "launch.cluster.worker_failures")


def _preload() -> None:
    device = os.environ.get(DEVICE)
    if device is not None:
        for name in _OF_WORKERS:
            importlib.import_module(name)
        from pipeline.train.deepspeed_schema import import_deepspeed

        import_deepspeed(device)
    elif CONTROLLER in os.environ:
        for name in _OF_CONTROLLER:
            importlib.import_module(name)


gc.disable()  # the imports take an eighth less time
_preload()
gc.enable()
