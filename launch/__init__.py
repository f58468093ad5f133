"""The command line, and Ray: how runs are started and watched."""

import os

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # the interface that this package is written for, whatever the shell says
