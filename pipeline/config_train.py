"""The config's sections about training: `train`, `optim`, `loss`, `ema` and `schedule`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config_fields import Auto, Count, Fraction, Location, Precision, Section, registered
from pipeline.extension_points import OPTIMIZERS, SCHEDULES


class Train(Section):
    """`train.*`: epochs, batch size, mixed precision, and recovery from NaN and out of memory."""

    epochs: float = Field(
        90, gt=0, description="number of epochs (passes over the training split); fractions are allowed"
    )
    global_batch_size: Count = Field(
        256, description="images per optimizer step over all workers; gradient accumulation where devices hold fewer"
    )
    max_device_batch_size: Count = Field(
        64,
        description="largest micro-batch per device; lower it if out of memory: gradient accumulation fills up "
        "the batch",
    )
    precision: Auto | Precision = Field(
        "auto",
        description="mixed precision (autocast): bf16 or fp16 (loss scaling; needs ZeRO stage 0); auto: bf16 on "
        "CUDA, fp32 on the CPU",
    )
    log_every_steps: Count = Field(10, description="logging interval, optimizer steps")
    on_nan: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="if the loss is NaN or infinite: `stop` the run, `skip` the step, or `rewind` to the latest "
        "checkpoint",
    )
    nan_limit: Count = Field(10, description="maximum number of skipped steps or rewinds, after which the run ends")
    on_out_of_memory: Literal["stop", "halve"] = Field(
        "stop",
        description="if out of memory: `stop`, or `halve` the micro-batch per device, before training, until it fits",
    )
    profile_steps: tuple[Count, Count] | None = Field(
        None, description="profile steps [first, last] on rank 0; the trace goes to the run's folder and artifacts"
    )

    @model_validator(mode="after")
    def _profile(self) -> "Train":
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)} must be [first, last] with first <= last")
        return self


class Optim(Section):
    """`optim.*`: the optimizer, learning rate, weight decay and gradient clipping."""

    name: Annotated[str, registered(OPTIMIZERS)] = Field(
        "sgd",
        description="optimizer: `sgd`, `adamw`, `lamb`, `lars`, `muon` (the last three need ZeRO stage 0), or a "
        "plugin's",
    )
    lr: float = Field(0.1, gt=0, description="peak learning rate, before `lr_scaling`")
    lr_scaling: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description="scale the learning rate by global batch size / `lr_base_batch` (linear), or by its square root",
    )
    lr_base_batch: Count = Field(256, description="global batch size for which `lr` is meant, if it is scaled")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of `sgd`, `lars` and `muon`")
    nesterov: bool = Field(True, description="Nesterov momentum of `sgd`, `lars` and `muon`; no effect at momentum 0")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="Adam betas of `adamw`, `lamb` and `muon`, each below 1"
    )
    eps: float = Field(1e-8, gt=0, description="Adam epsilon of `adamw`, `lamb` and `muon`")
    weight_decay: float = Field(
        1e-4, ge=0, description="weight decay of convolution and linear weights; none for biases and norms"
    )
    clip_grad_norm: float | None = Field(
        None, gt=0, description="gradient clipping: maximum global gradient norm; null: no clipping"
    )

    @model_validator(mode="after")
    def _below_one(self) -> "Optim":
        if max(self.betas) >= 1:
            raise ValueError(f"betas={list(self.betas)} must each be below 1")
        return self

    @property
    def needs_full_weights(self) -> bool:
        """Whether the optimizer computes on whole weight tensors, which ZeRO 1-3 shard."""
        return OPTIMIZERS[self.name].needs_full_weights

    def peak_lr(self, global_batch_size: int) -> float:
        """Returns the scaled learning rate: linear (Goyal et al. 2017, arXiv 1706.02677) or by the square root."""
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.lr_scaling]
        return self.lr * (global_batch_size / self.lr_base_batch) ** power


class Loss(Section):
    """`loss.*`: the loss function, label smoothing and knowledge distillation."""

    name: Literal["cross-entropy", "bce"] = Field(
        "cross-entropy", description="loss function; `bce`: binary cross-entropy, mean over the classes"
    )
    label_smoothing: float = Field(
        0, ge=0, lt=1, description="label smoothing: fraction of the target that is spread over all classes"
    )
    teacher: Annotated[str | None, Location("input")] = Field(
        None,
        description="knowledge distillation: teacher model, models:/NAME@ALIAS or a checkpoint or run folder",
    )
    distillation_alpha: Fraction = Field(
        0.5, description="knowledge distillation: weight of the teacher's loss; the labels' loss has 1 - alpha"
    )
    distillation_temperature: float = Field(
        1, gt=0, description="knowledge distillation: temperature that divides the logits of teacher and student"
    )


class Ema(Section):
    """`ema.*`: exponential moving average (EMA) of the weights."""

    decay: float | None = Field(
        None, ge=0, lt=1, description="EMA (exponential moving average) of the weights: decay per step; null: no EMA"
    )
    warmup: bool = Field(True, description="EMA warmup, smaller decays at first: at most 1 - (1 + step) ** (-2 / 3)")


class Schedule(Section):
    """`schedule.*`: the learning rate schedule and warmup."""

    name: Annotated[str, registered(SCHEDULES)] = Field(
        "cosine",
        description="learning rate schedule after warmup: `cosine`, `step`, `linear`, `one-cycle`, or a plugin's",
    )
    warmup_epochs: float = Field(0, ge=0, description="learning rate warmup: epochs of linear increase to the peak")
    milestones: tuple[float, ...] = Field(
        (30, 60), description="`step`: epochs at which the learning rate is multiplied by `gamma`"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="`step`: learning rate factor at each milestone")
    pct_start: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="`one-cycle`: fraction of the run in which the learning rate increases from peak / 25",
    )
    min_lr_ratio: Fraction = Field(
        0, description="learning rate at the end of the run as a fraction of the peak: `cosine`, `linear`, `one-cycle`"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Schedule":
        if list(self.milestones) != sorted(set(self.milestones)) or any(m <= 0 for m in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be positive and increasing")
        return self
