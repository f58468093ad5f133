"""From the command to the tenth training step of the demo, beside a short DistributedDataParallel script.

python -m benchmarks.startup [--rounds 3]

Both train `densenet_tiny` on the same handwritten digits with two processes. The demo's time includes the resolved
plan, Ray, MLflow's tables and run; the script's only its imports, its processes and its loader.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import in_turns, report
from pipeline.data.digits import write_digits

BIN = Path(sys.executable).parent
STEPS = 10

SCRIPT = """
import sys, torch, timm, pipeline.model.densenet
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
dist.init_process_group("gloo")
pixels = transforms.Compose([transforms.RandomResizedCrop(32, (0.6, 1)), transforms.ToTensor()])
data = ImageFolder(sys.argv[1], pixels)
model = torch.nn.parallel.DistributedDataParallel(timm.create_model("densenet_tiny", num_classes=10))
optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
loader = DataLoader(data, 32, sampler=DistributedSampler(data), num_workers=1, drop_last=True)
for step, (images, labels) in enumerate(loader, 1):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}/", flush=True)
"""


def main() -> None:
    """Measures both in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder, "digits"))
        Path(folder, "script.py").write_text(SCRIPT)
        demo = [BIN / "densenet", "train", "configs/demo.yaml", f"data.root={folder}/digits"]
        processes = [BIN / "torchrun", "--nproc-per-node=2", "--master-port=0"]
        script = [*processes, f"{folder}/script.py", f"{folder}/digits/train"]
        numbers = iter(range(1000))
        cases = {
            "make demo's command": lambda: until_step([*demo, f"run.output={folder}/{next(numbers)}"]),
            "torchrun, a short script": lambda: until_step(script),
        }
        report(f"command to step {STEPS}, two processes", in_turns(cases, options.rounds), "s", "make demo's command")


def until_step(command: list[object]) -> float:
    """Seconds until the command's output tells of the step; it is ended then."""
    started = time.perf_counter()
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if f"step {STEPS}/" in line:
                elapsed = time.perf_counter() - started
                process.terminate()
                process.communicate()
                return elapsed
    raise RuntimeError(f"{command[0]} ended before step {STEPS}:\n" + "".join(printed))


if __name__ == "__main__":
    main()
