"""The DeepSpeed engine: the one place that trains with DeepSpeed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pipeline.config import RunConfig
from pipeline.derived import Derived
from pipeline.model.weights import freeze, lr_scales
from pipeline.train import optimizer_state
from pipeline.train.compile import compile_model
from pipeline.train.deepspeed_config import HALF, deepspeed_config
from pipeline.train.deepspeed_schema import import_deepspeed
from pipeline.train.optim import create_optimizer, parameter_groups


class Engine:
    """A model under DeepSpeed on one rank: forward, backward, step, and the full state in and out.

    The process group must exist already. All methods but `forward` and `infer` are collective: every rank calls them
    alike. `ema` is the moving average of the weights and buffers, a whole model on every rank, or None; `warn` is told
    where something asked for is left out.
    """

    def __init__(
        self,
        config: RunConfig,
        derived: Derived,
        model: nn.Module,
        device: torch.device,
        warn: Callable[[str], None] = print,
    ) -> None:
        deepspeed = import_deepspeed(derived.device)
        if derived.device == "cpu":
            # Its shared-memory collectives need a compiler at start-up; gloo does without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if derived.device == "cuda" else "gloo")
        self._deepspeed = deepspeed
        self.stage = derived.zero_stage
        # Of the features alone: DeepSpeed takes weights in no other order than the usual one.
        self._format = torch.channels_last if derived.channels_last else torch.contiguous_format
        self._autocast = autocast(derived, device)
        if device.type == "cuda":
            choose_kernels(config)
        model = model.to(device)
        if config.engine.sync_batch_norm:
            model = convert_sync_batchnorm(model)
        self._frozen_norms = freeze(model, config.finetune)
        self.ema = None
        if config.ema.decay is not None:
            self.ema = ModelEmaV3(model, config.ema.decay, use_warmup=config.ema.warmup)
        if config.engine.compile != "off":
            shape_NCHW = (derived.device_batch_size, config.model.in_chans, *2 * (config.data.image_size,))
            example_NCHW = torch.zeros(shape_NCHW, device=device).to(memory_format=self._format)
            with self._autocast:
                compile_model(model, example_NCHW, warn if config.engine.compile == "try" else None)
        groups = parameter_groups(model, config.optim.weight_decay, lr_scales(model, config.finetune))
        # Not in fp16: a fused optimizer unscales and skips by itself, so that nobody else learns of an overflow.
        fused = device.type == "cuda" and derived.precision != "fp16" and not config.engine.offload_optimizer
        optimizer = create_optimizer(groups, config.optim, fused)
        self._skip = self._measure = self._applied = False
        self._norm: torch.Tensor | None = None
        optimizer.step = self._gated(optimizer.step)  # type: ignore[method-assign]
        told = deepspeed_config(config, derived)
        zero = told["zero_optimization"]  # DeepSpeed makes buffers as large as the bucket, whatever the model has
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], sum(p.numel() for p in model.parameters()))
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=told)
        if self.stage == 0 and config.optim.clip_grad_norm:  # DeepSpeed's own keeps no norm
            self._engine.clip_fp32_gradients = partial(self._clip, config.optim.clip_grad_norm)
        if self.ema is not None:
            pairs = list(zip(_tensors(self.ema.module), _tensors(self.module), strict=True))
            self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
            self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        # What the forward pass in training mode changes.
        self._statistics = [b for m in self.module.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
        self._kept = [torch.empty_like(buffer) for buffer in self._statistics]
        self.train()

    @property
    def module(self) -> nn.Module:
        """The model, on this rank; at ZeRO stage 3 its weights are in parts."""
        return self._engine.module

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass gathers weights, so that ranks must make equally many of them."""
        return self.stage == 3

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits [N, K]."""
        return self._engine(images_NCHW.contiguous(memory_format=self._format)).float()

    @torch.no_grad()
    def infer(self, model: nn.Module, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits [N, K] of another model (the average, a teacher), at this engine's precision."""
        with self._autocast:
            return model(images_NCHW.contiguous(memory_format=self._format)).float()

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode, as `nn.Module.train`; frozen batch norms stay in evaluation mode."""
        self._engine.train(mode)
        for norm in self._frozen_norms:
            norm.eval()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradient of a micro-batch's mean loss."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, skip: bool = False, measure: bool = False) -> bool:
        """Lets the optimizer step, once the backward pass of a global batch is through; or drops the gradients.

        `measure` asks for `grad_norm` of this step. Returns whether the weights have moved, on all ranks alike: they
        have not where the step is skipped, or where fp16 gradients overflowed.
        """
        self._skip, self._measure, self._norm, self._applied = skip, measure, None, False
        self._engine.step()
        self._skip = False
        return self._applied

    @property
    def grad_norm(self) -> float | None:
        """The L2 norm of the last step's gradient before clipping, where it was measured; waits for the device."""
        norm = self._norm if self.stage == 0 else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _clip(self, largest: float) -> None:
        self._norm = clip_grad_norm_(self.module.parameters(), largest)

    def _gated(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The optimizer's step, left out where a step is skipped; all that DeepSpeed does around it goes on."""

        def gated(*args: Any, **options: Any) -> Any:
            if self._skip:
                return None
            if self._measure and self.stage == 0 and self._norm is None:
                self._norm = get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
            self._applied = True  # the loss scaler and ZeRO call it where nothing overflowed, so no wait is added here
            return step(*args, **options)

        return gated

    def keep_statistics(self) -> None:
        """Remembers batch norm's statistics as they are."""
        torch._foreach_copy_(self._kept, self._statistics)

    def restore_statistics(self) -> None:
        """Brings them back."""
        torch._foreach_copy_(self._statistics, self._kept)

    def close(self) -> None:
        """Lets go of DeepSpeed's hooks and buffers."""
        self._engine.destroy()

    def update_ema(self, steps: int) -> None:
        """Moves the average towards the weights, once for each step that moved them; `steps` have been made."""
        if self.ema is not None:
            with self._gathered():
                self._move_average(1 - self.ema.get_decay(steps))

    @torch.no_grad()
    def _move_average(self, weight: float) -> None:
        """As `ModelEmaV3.update`, in a handful of kernels in the place of one for each of batch norm's counters."""
        torch._foreach_lerp_([e for e, _ in self._floats], [m for _, m in self._floats], weight=weight)
        torch._foreach_copy_([e for e, _ in self._counters], [m for _, m in self._counters])

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of each parameter group to `rate` times the group's own factor."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def average_batch_norm(self) -> None:
        """Replaces the running statistics of batch norm, those of the average too, by their mean over the ranks."""
        average_batch_norm(self.module)
        if self.ema is not None:
            average_batch_norm(self.ema)

    def full_state(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers in fp32 on the CPU; empty on every rank but 0."""
        with self._gathered():
            return _on_cpu(self.module) if dist.get_rank() == 0 else {}

    def non_finite_weights(self) -> list[str]:
        """The weights that hold values that are no numbers."""
        with self._gathered():
            return [name for name, value in self.module.named_parameters() if not torch.isfinite(value).all()]

    def ema_state(self) -> dict[str, torch.Tensor]:
        """As `full_state`, of the average; empty where there is none."""
        return _on_cpu(self.ema.module) if self.ema is not None and dist.get_rank() == 0 else {}

    @property
    def loss_scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss in fp16, and skips a step whose gradients overflow; None at other precisions."""
        return self._engine.torch_autocast_z0_gradscaler

    def load_ema(self, file: Path) -> None:
        """Reads the average from a file of weights, on every rank."""
        if self.ema is not None:
            self.ema.module.load_state_dict(load_file(file))

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimizer's whole state on the CPU, see `pipeline.train.optimizer_state`; empty on every rank but 0."""
        return optimizer_state.gather(self._optimizer, self.module, self.stage)

    def load_optimizer(self, file: Path) -> None:
        """Reads the optimizer's whole state from a file; the weights are the ones that the model was given."""
        optimizer_state.scatter(self._optimizer, self.module, self.stage, load_file(file))

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield


def autocast(derived: Derived, device: torch.device) -> torch.autocast:
    """The run's precision for code outside the engine."""
    return torch.autocast(device.type, getattr(torch, HALF[derived.precision]), enabled=derived.precision != "fp32")


def _on_cpu(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}


def choose_kernels(config: RunConfig) -> None:
    """Sets PyTorch's global switches for CUDA kernels.

    cuDNN's search for the fastest algorithm stays off: on an H200 it gained nothing, and its choices differ between
    starts.
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = config.engine.deterministic
    torch.backends.cudnn.allow_tf32 = config.engine.tf32
    torch.set_float32_matmul_precision("high" if config.engine.tf32 else "highest")


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def average_batch_norm(model: nn.Module) -> None:
    """Averages all running means and variances over the ranks in one collective."""
    if dist.get_world_size() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    flat = torch.cat([b.reshape(-1) for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
