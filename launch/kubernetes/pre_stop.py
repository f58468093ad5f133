"""Before a pod of workers goes: tells Ray that its node will, and waits for the checkpoint that follows.

python -m launch.kubernetes.pre_stop RUNS [--wait SECONDS] [--node-id ID]

Kubernetes runs it as the pod's preStop hook. Ray tells the workers, and they write a checkpoint at the next log line.
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
    """Ends with 0 in any case: a hook that fails would end the pod at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--wait", type=float, default=100)
    parser.add_argument("--node-id")
    options = parser.parse_args()
    address = os.environ["RAY_ADDRESS"]
    began = time.time()
    node = options.node_id or node_id(address)
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "its pod is being deleted"]
    deadline = ["--deadline-remaining-seconds", str(int(options.wait))]
    done = subprocess.run([*command, *why, *deadline], capture_output=True, text=True)
    if done.returncode:
        print(f"Ray was not told: {done.stdout}{done.stderr}")
        return
    written = wait_for_checkpoint(options.runs, began, began + options.wait)
    print(f"the checkpoint {written} is written" if written else f"no checkpoint came within {options.wait:g} s")


def wait_for_checkpoint(runs: Path, since: float, until: float) -> Path | None:
    """The first checkpoint below `runs` that is committed after the Unix time `since`, or None at `until`."""
    while time.time() < until:
        for manifest in runs.glob(f"*/checkpoints/{PREFIX}*/{MANIFEST}"):
            if manifest.stat().st_mtime > since:
                return manifest.parent
        time.sleep(_POLL_S)
    return None


if __name__ == "__main__":
    main()
