"""The DeepSpeed engine: the one place that knows DeepSpeed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import Derived, RunConfig
from pipeline.train.optim import create_optimizer


def deepspeed_config(config: RunConfig, derived: Derived) -> dict[str, Any]:
    """Everything that DeepSpeed is told, derived from the run's config.

    Mixed precision is `torch_autocast`, never a cast of the model: batch norm and its running statistics stay in
    fp32. Clipping is always explicit, because DeepSpeed 0.19 clips to norm 1.0 when it is told nothing.
    """
    return {
        "train_batch_size": derived.global_batch_size,
        "train_micro_batch_size_per_gpu": derived.device_batch_size,
        "gradient_accumulation_steps": derived.accumulation,
        "gradient_clipping": config.optim.clip_grad_norm or 0.0,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": derived.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**62,
    }


class Engine:
    """A model under DeepSpeed on one rank: forward, backward, step, and the full state in and out.

    The process group must exist already. All methods but `forward` are collective: every rank calls them alike.
    """

    def __init__(self, config: RunConfig, derived: Derived, model: nn.Module, device: torch.device) -> None:
        os.environ.setdefault("DS_ACCELERATOR", derived.device)
        import deepspeed  # the accelerator is chosen on import, so the variable comes first

        if derived.device == "cpu":
            # Its shared-memory collectives need a compiler at start-up; gloo does without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if derived.device == "cuda" else "gloo")
        self._deepspeed = deepspeed
        self.stage = config.engine.zero_stage
        model = model.to(device)
        optimizer = create_optimizer(model, config.optim)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, derived)
        )

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass gathers weights, so that ranks must make equally many of them."""
        return self.stage == 3

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits [N, K]."""
        return self._engine(images_NCHW).float()

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradient of a mean loss; the optimizer steps when the global batch is complete."""
        self._engine.backward(loss)
        self._engine.step()

    def set_learning_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def average_batch_norm(self) -> None:
        """Replaces the running statistics of batch norm by their mean over the ranks."""
        average_batch_norm(self.module)

    def full_state(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers in fp32 on the CPU; empty on every rank but 0."""
        with self._gathered():
            if dist.get_rank() != 0:
                return {}
            return {k: v.detach().cpu().clone().contiguous() for k, v in self.module.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Writes this rank's part of the optimizer and model state below `folder`."""
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, at the same number of ranks and the same ZeRO stage."""
        path, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder}")

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield


def average_batch_norm(model: nn.Module) -> None:
    """Averages all running means and variances over the ranks in one collective."""
    if dist.get_world_size() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    flat = torch.cat([b.reshape(-1) for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
