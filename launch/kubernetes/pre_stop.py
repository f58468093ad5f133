"""The preStop hook of a worker pod: drains the pod's Ray node, and waits for a checkpoint.

python -m launch.kubernetes.pre_stop --run FOLDER [--wait SECONDS] [--node-id ID]

Kubernetes runs it before it stops the pod. Ray notifies the workers of the preemption, and they write a checkpoint at
the next log line.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from launch.cluster.connect import node_id
from pipeline.train.checkpoint import MANIFEST, PREFIX

_POLL_S = 0.5


def main() -> None:
    """Runs the hook; exits with 0 in any case, since a failed hook would stop the pod at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--wait", type=float, default=100)
    parser.add_argument("--node-id")
    options = parser.parse_args()
    address = os.environ["RAY_ADDRESS"]
    started = time.time()
    node = options.node_id or node_id(address)
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "its pod is being deleted"]
    deadline = ["--deadline-remaining-seconds", str(int(options.wait))]
    done = subprocess.run([*command, *reason, *deadline], capture_output=True, text=True)
    if done.returncode:
        print(f"ray drain-node failed: {done.stdout}{done.stderr}")
        return
    checkpoint = wait_for_checkpoint(options.run, started, started + options.wait)
    print(f"wrote checkpoint {checkpoint}" if checkpoint else f"no checkpoint was written within {options.wait:g} s")


def wait_for_checkpoint(run: Path, since: float, until: float) -> Path | None:
    """Waits until a checkpoint of the run folder is committed after `since`, or until `until` (Unix times).

    Returns:
        The checkpoint's folder, or None.
    """
    while time.time() < until:
        for manifest in run.glob(f"checkpoints/{PREFIX}*/{MANIFEST}"):
            if manifest.stat().st_mtime > since:
                return manifest.parent
        time.sleep(_POLL_S)
    return None


if __name__ == "__main__":
    main()
