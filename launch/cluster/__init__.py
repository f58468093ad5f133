"""All that knows Ray: clusters, workers, jobs. No other room imports it."""

import os

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # the interface that this room is written for, whatever the shell says
