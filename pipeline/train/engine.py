"""The DeepSpeed engine: the only module that trains with DeepSpeed."""

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
from pipeline.train.deepspeed_config import AUTOCAST_DTYPES, deepspeed_config
from pipeline.train.deepspeed_schema import import_deepspeed
from pipeline.train.gradients import BucketedReduction, PartitionedGradients, order_streams_on_device
from pipeline.train.optim import create_optimizer, parameter_groups


class Engine:
    """A model in DeepSpeed on one rank: forward, backward, optimizer step, and saving and loading the full state.

    Needs an existing process group. All methods but `forward` and `infer` are collective: call them on every rank.
    `ema` is the exponential moving average (EMA) of weights and buffers, a full model on every rank, or None. `warn`
    reports a failed compilation where `engine.compile` is `try`.
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
            # DeepSpeed's shared-memory collectives need a compiler at start-up; gloo does not.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if derived.device == "cuda" else "gloo")
        self._deepspeed = deepspeed
        self.stage = derived.zero_stage
        # For inputs and features only: DeepSpeed accepts weights only in contiguous format.
        self._memory_format = torch.channels_last if derived.channels_last else torch.contiguous_format
        self._autocast = autocast(derived, device)
        if device.type == "cuda":
            set_cuda_flags(config)
        model = model.to(device)
        if config.engine.sync_batch_norm:
            model = convert_sync_batchnorm(model)
        self._frozen_norms = freeze(model, config.finetune)
        self.ema = None
        if config.ema.decay is not None:
            self.ema = ModelEmaV3(model, config.ema.decay, use_warmup=config.ema.warmup)
        if config.engine.compile != "off":
            shape_NCHW = (derived.device_batch_size, config.model.in_chans, *2 * (config.data.image_size,))
            example_NCHW = torch.zeros(shape_NCHW, device=device).to(memory_format=self._memory_format)
            with self._autocast:
                compile_model(model, example_NCHW, warn if config.engine.compile == "try" else None)
        groups = parameter_groups(model, config.optim.weight_decay, lr_scales(model, config.finetune))
        # Not in fp16: a fused optimizer unscales and skips by itself, which hides gradient overflows.
        fused = device.type == "cuda" and derived.precision != "fp16" and not config.engine.offload_optimizer
        optimizer = create_optimizer(groups, config.optim, fused)
        self._skip = self._measure_norm = self._applied = False
        self._norm: torch.Tensor | None = None
        optimizer.step = self._skippable(optimizer.step)  # type: ignore[method-assign]
        settings = deepspeed_config(config, derived)
        zero = settings["zero_optimization"]  # DeepSpeed allocates whole buckets, however small the model is
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], sum(p.numel() for p in model.parameters()))
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._prepare_gradients(config, zero, device)
        if self.ema is not None:
            pairs = list(zip(_tensors(self.ema.module), _tensors(self.module), strict=True))
            self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
            self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        # Running statistics, which the forward pass changes in training mode.
        self._statistics = [b for m in self.module.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
        self._saved_statistics = [torch.empty_like(buffer) for buffer in self._statistics]
        self.train()

    def _prepare_gradients(self, config: RunConfig, zero: dict[str, Any], device: torch.device) -> None:
        """Replaces what DeepSpeed does to gradients where it waits for the device or leaves it idle."""
        self._reduction: BucketedReduction | None = None
        # With CPU offload DeepSpeed measures and clips.
        self._partitions: PartitionedGradients | None = None
        self._max_norm = config.optim.clip_grad_norm
        if self.stage > 0:
            if not config.engine.offload_optimizer:
                self._partitions = PartitionedGradients(self._optimizer, self.stage)
            if self.stage < 3 and device.type == "cuda" and zero.get("overlap_comm"):
                order_streams_on_device(self._optimizer, self._deepspeed.accelerator.get_accelerator())
            return
        if self._max_norm is not None:  # DeepSpeed's own clipping does not store the norm
            self._engine.clip_fp32_gradients = partial(self._clip, self._max_norm)
        self._engine.enable_backward_allreduce = False
        if dist.get_world_size() > 1:
            self._reduction = BucketedReduction(self._engine, zero["reduce_bucket_size"], device)

    @property
    def module(self) -> nn.Module:
        """The model on this rank; ZeRO stage 3 partitions its weights."""
        return self._engine.module

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass gathers weights, so that all ranks must run equally many."""
        return self.stage == 3

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits [N, K]."""
        return self._engine(images_NCHW.contiguous(memory_format=self._memory_format)).float()

    @torch.no_grad()
    def infer(self, model: nn.Module, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits [N, K] of another model (EMA, teacher), without gradients, at this engine's precision."""
        with self._autocast:
            return model(images_NCHW.contiguous(memory_format=self._memory_format)).float()

    def train(self, mode: bool = True) -> None:
        """Sets training or evaluation mode, as `nn.Module.train`; frozen batch norms stay in evaluation mode."""
        self._engine.train(mode)
        for norm in self._frozen_norms:
            norm.eval()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradients of a micro-batch's mean loss (gradient accumulation)."""
        self._engine.backward(loss)
        if self._reduction is not None:
            self._reduction.finish()
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, skip: bool = False, measure_norm: bool = False) -> bool:
        """Runs the optimizer step after the backward passes of a global batch; with `skip`, drops the gradients.

        `measure_norm` makes `grad_norm` available. Returns whether the weights changed, the same on all ranks: not
        where the step was skipped, or where fp16 gradients overflowed.
        """
        self._skip, self._measure_norm, self._norm, self._applied = skip, measure_norm, None, False
        if self._partitions is not None and not skip and (measure_norm or self._max_norm is not None):
            self._norm = self._partitions.norm()
            if self._max_norm is not None:
                self._partitions.clip(self._norm, self._max_norm)
        self._engine.step()
        self._skip = False
        return self._applied

    @property
    def grad_norm(self) -> float | None:
        """The L2 norm of the last step's gradient before clipping, or None if not measured; waits for the device."""
        deepspeed_measures = self.stage > 0 and self._partitions is None
        norm = self._engine.get_global_grad_norm() if deepspeed_measures else self._norm
        return None if norm is None else float(norm)

    def _clip(self, max_norm: float) -> None:
        self._norm = clip_grad_norm_(self.module.parameters(), max_norm)

    def _skippable(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the optimizer's step so that it can be skipped; everything that DeepSpeed does around it still runs."""

        def skippable(*args: Any, **options: Any) -> Any:
            if self._skip:
                return None
            if self._measure_norm and self.stage == 0 and self._norm is None:
                self._norm = get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
            self._applied = True  # called only where nothing overflowed, so no device sync is needed
            return step(*args, **options)

        return skippable

    def save_batch_norm(self) -> None:
        """Saves batch norm's running statistics for `restore_batch_norm`."""
        torch._foreach_copy_(self._saved_statistics, self._statistics)

    def restore_batch_norm(self) -> None:
        """Restores the running statistics that `save_batch_norm` saved."""
        torch._foreach_copy_(self._statistics, self._saved_statistics)

    def close(self) -> None:
        """Releases hooks and buffers."""
        if self._reduction is not None:
            self._reduction.close()
        self._engine.destroy()

    def update_ema(self, steps: int) -> None:
        """Updates the EMA; call it after each step that changed the weights. `steps` is the number of steps so far."""
        if self.ema is not None:
            with self._gathered():
                self._lerp_ema(1 - self.ema.get_decay(steps))

    @torch.no_grad()
    def _lerp_ema(self, weight: float) -> None:
        """Does what `ModelEmaV3.update` does, in a few kernels instead of one per batch norm counter."""
        torch._foreach_lerp_([e for e, _ in self._floats], [m for _, m in self._floats], weight=weight)
        torch._foreach_copy_([e for e, _ in self._counters], [m for _, m in self._counters])

    def set_learning_rate(self, lr: float) -> None:
        """Sets the learning rate of each parameter group to `lr` times the group's `lr_scale`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def average_batch_norm(self) -> None:
        """Averages batch norm's running statistics over the ranks, in the model and the EMA."""
        average_batch_norm(self.module)
        if self.ema is not None:
            average_batch_norm(self.ema)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Returns the model's parameters and buffers in fp32 on the CPU; empty on every rank but 0."""
        with self._gathered():
            return _on_cpu(self.module) if dist.get_rank() == 0 else {}

    def non_finite_weights(self) -> list[str]:
        """Returns the names of the weights that hold NaN or infinities."""
        with self._gathered():
            return [name for name, value in self.module.named_parameters() if not torch.isfinite(value).all()]

    def ema_state(self) -> dict[str, torch.Tensor]:
        """Returns what `full_state` returns, for the EMA; empty where there is none."""
        return _on_cpu(self.ema.module) if self.ema is not None and dist.get_rank() == 0 else {}

    @property
    def loss_scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16, which skips steps whose gradients overflow; None at other precisions."""
        return self._engine.torch_autocast_z0_gradscaler

    def load_ema(self, file: Path) -> None:
        """Loads the EMA from a weights file, on every rank."""
        if self.ema is not None:
            self.ema.module.load_state_dict(load_file(file))

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Returns the full optimizer state on the CPU (see `optimizer_state`); empty on every rank but 0."""
        return optimizer_state.gather(self._optimizer, self.module, self.stage)

    def load_optimizer(self, file: Path) -> None:
        """Loads the full optimizer state from a file; does not change the weights."""
        optimizer_state.scatter(self._optimizer, self.module, self.stage, load_file(file))

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield


def autocast(derived: Derived, device: torch.device) -> torch.autocast:
    """Returns the run's mixed-precision context (torch.autocast) for code outside the engine."""
    return torch.autocast(
        device.type, getattr(torch, AUTOCAST_DTYPES[derived.precision]), enabled=derived.precision != "fp32"
    )


def _on_cpu(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}


def set_cuda_flags(config: RunConfig) -> None:
    """Sets PyTorch's global switches for determinism and TF32 on CUDA.

    cuDNN's benchmark mode stays off: on an H200 it gained nothing, and its choices differ between starts.
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = config.engine.deterministic
    torch.backends.cudnn.allow_tf32 = config.engine.tf32
    torch.set_float32_matmul_precision("high" if config.engine.tf32 else "highest")


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def average_batch_norm(model: nn.Module) -> None:
    """Averages all running means and variances over the ranks, in one all-reduce."""
    if dist.get_world_size() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    flat = torch.cat([b.reshape(-1) for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
