"""What the steps of `benchmarks.gpu` share: their options, results, and timers."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import report, save_result, seconds

if TYPE_CHECKING:
    from pipeline.config import Device  # needs pydantic, which the step `environment` does without

CLASSES = 1000
MODELS = {"densenet121": 256, "densenet169": 256, "densenet201": 192, "densenet264": 128}  # images per batch
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Context:
    """A step's options: where results go, the data, and the sizes that follow from `tiny`."""

    step: str
    output: Path
    images: Path | None
    cifar: Path | None
    tiny: bool

    @property
    def device(self) -> "Device":
        """The device to measure."""
        return "cpu" if self.tiny else "cuda"

    @property
    def torch_device(self) -> torch.device:
        """The same as torch's device."""
        return torch.device("cpu") if self.tiny else torch.device("cuda", 0)

    @property
    def models(self) -> dict[str, int]:
        """Models with their batch sizes."""
        return {"densenet_tiny": 4} if self.tiny else MODELS

    @property
    def model(self) -> tuple[str, int]:
        """The model of measurements that use one, with its batch size."""
        return next(iter(self.models.items()))

    @property
    def side(self) -> int:
        """Image size in pixels."""
        return 32 if self.tiny else 224

    @property
    def rounds(self) -> int:
        """Timed rounds."""
        return 1 if self.tiny else 3

    @property
    def steps(self) -> int:
        """Training steps in a round."""
        return 1 if self.tiny else 6

    def record(self, **values: Any) -> None:
        """Appends a line to results.jsonl."""
        line = json.dumps({"step": self.step} | values, default=str)
        with (self.output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(line, flush=True)

    def title(self, benchmark: str) -> str:
        """Returns a benchmark's name in the results."""
        return f"{'Tiny' if self.tiny else 'GPU'}: {benchmark}"

    def save(self, benchmark: str, case: str, value: float, unit: str) -> None:
        """Saves a value that is compared with nothing."""
        self.record(benchmark=self.title(benchmark), case=case, value=value, unit=unit)
        save_result(self.title(benchmark), case, value, unit)

    def compare(self, benchmark: str, values: dict[str, list[float]], unit: str, ours: str) -> None:
        """Saves the rounds of each case, and the ratios of `ours` to them."""
        self.record(benchmark=self.title(benchmark), values=values, unit=unit)
        report(self.title(benchmark), values, unit, ours)

    def batch(self, size: int, side: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the same random images and labels each time."""
        generator = torch.Generator().manual_seed(2)
        images_NCHW = torch.randn(size, 3, *2 * (side or self.side,), generator=generator)
        labels_N = torch.randint(0, CLASSES, (size,), generator=generator)
        return images_NCHW.to(self.torch_device), labels_N.to(self.torch_device)

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """Joins a process group of one rank."""
        from pipeline.train.process_group import process_group

        backend = "gloo" if self.tiny else "nccl"
        with tempfile.TemporaryDirectory() as folder, process_group(Path(folder, "store"), backend=backend):
            yield


def synchronize() -> None:
    """Waits for the GPU's queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def throughput(context: Context, batch: int, step: Callable[[], object]) -> Callable[[], float]:
    """Returns a function that measures images per second over the steps of a round."""

    def run() -> None:
        for _ in range(context.steps):
            step()
        synchronize()

    def measured() -> float:
        synchronize()
        return context.steps * batch / seconds(run)

    return measured


def first_step(create: Callable[[], Step]) -> tuple[Step, float]:
    """Creates a training step and runs it once; returns it with its peak memory in MB, 0 on the CPU."""
    if not torch.cuda.is_available():
        step = create()
        step()
        return step, 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = create()
    step()
    return step, (torch.cuda.max_memory_allocated() - before) / 1e6
