"""Ray clusters, workers and jobs. Only this package imports Ray."""

import os

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # this package uses the Ray Train V2 API, whatever the shell sets
