"""Gradients between the ranks: their norm and clipping where ZeRO partitions them, and their reduction at stage 0.

Nothing here waits for the device. DeepSpeed's ZeRO optimizers do: they measure the norm in every step, and read it to
skip a step whose gradients are not finite.
"""

from typing import Any

import torch
import torch.distributed as dist


class PartitionedGradients:
    """The averaged gradients in DeepSpeed's optimizer of ZeRO stage 1, 2 or 3, between backward pass and step.

    Takes over measuring and clipping; stages 1 and 2 also need `compute_grad_norm: false` in DeepSpeed's config.
    """

    def __init__(self, zero: Any, stage: int) -> None:
        self._zero = zero
        self._params = zero.params_in_partition if stage < 3 else zero.fp16_groups
        self._sum_dtype = torch.float32 if stage < 3 else torch.float64  # DeepSpeed's, after sums in fp64
        if stage == 3:
            zero._get_norm_groups = lambda: [0.0]  # a constant on the host, which DeepSpeed reads without a wait

    def norm(self) -> torch.Tensor:
        """Returns the L2 norm of the whole gradient, a scalar on the device (a collective)."""
        norms = [torch.stack(torch._foreach_norm(grads, dtype=torch.float64)) for grads in self._groups()]
        squares_G = torch.stack([norm_P.square().sum() for norm_P in norms]).to(self._sum_dtype)
        dist.all_reduce(squares_G)
        return torch.linalg.vector_norm(squares_G.sqrt())

    def clip(self, norm: torch.Tensor, max_norm: float) -> None:
        """Scales the gradients, whose norm is `norm`, down to `max_norm`."""
        scale = 1 / torch.clamp((norm + 1e-6) / max_norm, min=1)
        torch._foreach_mul_([grad for grads in self._groups() for grad in grads], scale)

    def _groups(self) -> list[list[torch.Tensor]]:
        """Returns this rank's part of the gradients by parameter group, without the zeros that fill up a partition."""
        averaged = [self._zero.averaged_gradients[i] for i in range(len(self._params))]
        return [grads[: len(params)] or grads for grads, params in zip(averaged, self._params, strict=True)]


class BucketedReduction:
    """Averages the gradients at ZeRO stage 0 over the ranks, in buckets, while the backward pass continues.

    DeepSpeed averages them after the backward pass. On CUDA this runs on a stream of its own. Parameters must get
    their gradients in the same order on all ranks.

    Args:
        engine: DeepSpeed's engine.
        bucket_size: Elements per bucket.
        device: The rank's device.
    """

    def __init__(self, engine: Any, bucket_size: int, device: torch.device) -> None:
        engine.enable_backward_allreduce = False
        self._engine, self._bucket_size, self._device = engine, bucket_size, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self._reduced: set[torch.Tensor] = set()
        self._bucket: list[torch.Tensor] = []
        self._elements = 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._add) for p in self._parameters]

    def finish(self) -> None:
        """Averages the last bucket; call it after the backward pass of each micro-batch."""
        if not self._engine.is_gradient_accumulation_boundary():
            return
        for parameter in self._parameters:
            if parameter not in self._reduced:  # it does not take part in the loss
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self._add(parameter)
        self._reduce()
        self._reduced.clear()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _add(self, parameter: torch.Tensor) -> None:
        """Adds a parameter's gradient to the bucket (in the thread of the backward pass)."""
        if not self._engine.is_gradient_accumulation_boundary():
            return
        assert parameter not in self._reduced, "a parameter has one gradient per backward pass"
        assert parameter.grad is not None
        self._reduced.add(parameter)
        self._bucket.append(parameter.grad)
        self._elements += parameter.numel()
        if self._elements >= self._bucket_size:
            self._reduce()

    def _reduce(self) -> None:
        if not self._bucket:
            return
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # does nothing for None
            self._engine.allreduce_and_copy(self._bucket, self._engine.seq_data_parallel_group)
        self._bucket, self._elements = [], 0


def order_streams_on_device(zero: Any, accelerator: Any) -> None:
    """Lets the device, not the host, wait for the reduction of the gradients after the backward pass of ZeRO 1 or 2.

    With `overlap_comm` DeepSpeed synchronizes the device there, so that the step does not overtake the reduction on its
    stream. `accelerator` is DeepSpeed's.
    """
    epilogue, synchronize = zero.independent_gradient_partition_epilogue, accelerator.synchronize

    def wait_on_device() -> None:
        accelerator.current_stream().wait_stream(zero.reduction_stream)

    def ordered() -> None:
        accelerator.synchronize = wait_on_device
        try:
            epilogue()
        finally:
            accelerator.synchronize = synchronize

    zero.independent_gradient_partition_epilogue = ordered
