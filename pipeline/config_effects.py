"""Keys that are set and that nothing reads in this combination: one line for each.

A key counts as set where its value differs from the default, so that a saved config, which has all keys, is told the
same as the file that it came from. An empty list sets nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.choices import either
from pipeline.config import Elastic, RunConfig
from pipeline.derived import Derived
from pipeline.extension_points import OPTIMIZERS, SCHEDULES

_DEFAULT = RunConfig()
_Reads = Callable[[RunConfig, Derived], bool]


@dataclass(frozen=True)
class _Rule:
    """The keys are read where `reads` is true; else `why` says why not.

    There `c` is the config, `d` what is derived, and `of` has the optimizers or schedules that read a key.
    """

    keys: tuple[str, ...]
    reads: _Reads
    why: str


_RULES = (
    _Rule(
        ("optim.momentum",),
        lambda c, d: "momentum" in OPTIMIZERS[c.optim.name].reads,
        "it is of {of[momentum]}, optim.name is {c.optim.name}",
    ),
    _Rule(
        ("optim.nesterov",),
        lambda c, d: "nesterov" in OPTIMIZERS[c.optim.name].reads and c.optim.momentum > 0,
        "it is of {of[nesterov]} with momentum; optim.name is {c.optim.name}, optim.momentum {c.optim.momentum:g}",
    ),
    _Rule(
        ("optim.betas",),
        lambda c, d: "betas" in OPTIMIZERS[c.optim.name].reads,
        "it is of {of[betas]}, optim.name is {c.optim.name}",
    ),
    _Rule(
        ("optim.eps",),
        lambda c, d: "eps" in OPTIMIZERS[c.optim.name].reads,
        "it is of {of[eps]}, optim.name is {c.optim.name}",
    ),
    _Rule(("optim.lr_base_batch",), lambda c, d: c.optim.lr_scaling != "none", "optim.lr_scaling is none"),
    _Rule(
        ("schedule.milestones",),
        lambda c, d: "milestones" in SCHEDULES[c.schedule.name].reads,
        "it is of {of[milestones]}, schedule.name is {c.schedule.name}",
    ),
    _Rule(
        ("schedule.gamma",),
        lambda c, d: (
            "gamma" in SCHEDULES[c.schedule.name].reads and (c.schedule.name != "step" or bool(c.schedule.milestones))
        ),
        "it is of {of[gamma]} with milestones; schedule.name is {c.schedule.name}",
    ),
    _Rule(
        ("schedule.pct_start",),
        lambda c, d: "pct_start" in SCHEDULES[c.schedule.name].reads,
        "it is of {of[pct_start]}, schedule.name is {c.schedule.name}",
    ),
    _Rule(
        ("schedule.min_lr_ratio",),
        lambda c, d: "min_lr_ratio" in SCHEDULES[c.schedule.name].reads,
        "it is of {of[min_lr_ratio]}, schedule.name is {c.schedule.name}",
    ),
    _Rule(("loss.distillation_alpha",), lambda c, d: c.loss.teacher is not None, "there is no loss.teacher"),
    _Rule(
        ("loss.distillation_temperature",),
        lambda c, d: c.loss.teacher is not None and c.loss.distillation_alpha > 0,
        "it is of the teacher's part of the loss, and there is none",
    ),
    _Rule(("loss.teacher",), lambda c, d: c.loss.distillation_alpha > 0, "loss.distillation_alpha is 0"),
    _Rule(
        ("loss.label_smoothing", "loss.name"),
        lambda c, d: c.loss.teacher is None or c.loss.distillation_alpha < 1,
        "loss.distillation_alpha is 1: the teacher's answers are all that counts",
    ),
    _Rule(("ema.warmup",), lambda c, d: c.ema.decay is not None, "there is no average: ema.decay is null"),
    _Rule(
        ("augment.randaugment_num_ops", "augment.randaugment_magnitude"),
        lambda c, d: c.augment.auto_augment == "randaugment",
        "it is of randaugment, augment.auto_augment is {c.augment.auto_augment}",
    ),
    _Rule(
        ("augment.erase_scale", "augment.erase_ratio", "augment.erase_fill"),
        lambda c, d: c.augment.erase_prob > 0,
        "augment.erase_prob is 0",
    ),
    _Rule(
        ("augment.mix_prob",), lambda c, d: c.augment.mixes, "augment.mixup_alpha and augment.cutmix_alpha are both 0"
    ),
    _Rule(
        ("augment.mixup_alpha", "augment.cutmix_alpha"), lambda c, d: c.augment.mix_prob > 0, "augment.mix_prob is 0"
    ),
    _Rule(
        ("augment.mix_switch_prob",),
        lambda c, d: c.augment.mixup_alpha > 0 and c.augment.cutmix_alpha > 0,
        "it is of mixup and CutMix together, and one of them is 0",
    ),
    _Rule(("data.window",), lambda c, d: c.data.shuffle == "windowed", "data.shuffle is {c.data.shuffle}"),
    _Rule(("train.nan_limit",), lambda c, d: c.train.on_nan != "stop", "train.on_nan is stop"),
    _Rule(("train.on_out_of_memory",), lambda c, d: d.device == "cuda", "it is of GPUs, this run is on the CPU"),
    _Rule(
        ("train.profile_steps",),
        lambda c, d: c.train.profile_steps is None or c.train.profile_steps[1] <= d.total_steps,
        "the run ends at step {d.total_steps}, before the trace is complete",
    ),
    _Rule(
        ("engine.zero_stage",),
        lambda c, d: d.workers > 1 or c.engine.zero_stage == 0 or c.engine.offload_optimizer,
        "there is one worker, so nothing is sharded",
    ),
    _Rule(
        ("engine.offload_optimizer",),
        lambda c, d: d.device == "cuda",
        "the optimizer's state is in the CPU's memory anyhow: this run is on the CPU",
    ),
    _Rule(
        ("engine.deterministic", "engine.tf32"),
        lambda c, d: d.device == "cuda",
        "it is of GPUs, this run is on the CPU",
    ),
    _Rule(
        ("engine.sync_batch_norm",),
        lambda c, d: d.workers > 1 and not c.finetune.freeze_batch_norm,
        "there is one worker, or finetune.freeze_batch_norm is true",
    ),
    _Rule(("engine.communication_data_type",), lambda c, d: d.workers > 1, "there is one worker"),
    _Rule(
        ("engine.reduce_bucket_size",), lambda c, d: d.zero_stage > 0, "it is of ZeRO stages 1 to 3, this run's is 0"
    ),
    _Rule(
        ("checkpoint.every_samples",),
        lambda c, d: (c.checkpoint.every_samples or 0) <= d.total_samples,
        "the run ends at {d.total_samples} samples",
    ),
    _Rule(
        ("checkpoint.keep_every_epochs",),
        lambda c, d: (c.checkpoint.keep_every_epochs or 0) <= c.train.epochs,
        "the run ends at epoch {c.train.epochs:g}",
    ),
    _Rule(
        ("cluster.resize_interval_s",),
        lambda c, d: isinstance(c.cluster.workers, Elastic),
        "the number of workers is fixed: cluster.workers is {c.cluster.workers}",
    ),
    _Rule(("cluster.placement",), lambda c, d: d.workers > 1, "there is one worker"),
    _Rule(
        ("cluster.replacement_timeout_s",),
        lambda c, d: c.cluster.max_failures > 0 or isinstance(c.cluster.workers, Elastic),
        "cluster.max_failures is 0: a run that lost a worker ends",
    ),
)
_EMBEDDED = ("cluster.placement",)  # of several nodes
_CLUSTER = ("cluster.dashboard_port",)  # of a Ray that the run starts itself

# Keys of DeepSpeed's `zero_optimization` that not all of stages 1 to 3 read, without the prefix `stage3_`.
_STAGE_3 = {
    "allgather_sequential",
    "enable_sanity_checks",
    "leaf_module",
    "log_trace_cache_warnings",
    "max_live_parameters",
    "max_reuse_distance",
    "memory_efficient_linear",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "offload_param",
    "override_module_apply",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "save_muon_momentum_buffer_in_memory",
    "sub_group_size",
    "use_all_reduce_for_fetch_params",
    "zero_hpz_partition_size",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
}
_STAGES_1_2 = {
    "allgather_bucket_size",
    "allgather_partitions",
    "compute_grad_norm",
    "ignore_unused_parameters",
    "parameter_alignment",
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
}


def without_effect(config: RunConfig, derived: Derived, embedded: bool) -> list[str]:
    """One line for each key that is set and not read in this run; `embedded` where the run starts a Ray of its own."""
    of = _readers()
    lines = [
        _line(key, _value(config, key), rule.why.format(c=config, d=derived, of=of))
        for rule in _RULES
        if not _elastic_hides(config, rule) and not rule.reads(config, derived)
        for key in rule.keys
        if _is_set(config, key)
    ]
    for key in _EMBEDDED if embedded else _CLUSTER:
        why = "there is one node" if embedded else "the run joins a cluster, whose dashboard it has"
        if _is_set(config, key) and not any(line.startswith(f"{key}=") for line in lines):
            lines.append(_line(key, _value(config, key), why))
    return lines + list(_zero_keys(config, derived))


def _readers() -> dict[str, str]:
    """Which optimizers or schedules read a key, those of plugins too."""
    readers: dict[str, list[str]] = {}
    for choices in (OPTIMIZERS, SCHEDULES):
        for name, kind in choices.items():
            for key in kind.reads:
                readers.setdefault(key, []).append(name)
    return {key: either(names, "and") for key, names in readers.items()}


def _elastic_hides(config: RunConfig, rule: _Rule) -> bool:
    """Whether a rule on the number of workers may change while the run goes on."""
    return "one worker" in rule.why and isinstance(config.cluster.workers, Elastic)


def _zero_keys(config: RunConfig, derived: Derived) -> Iterator[str]:
    for key, value in config.engine.deepspeed.get("zero_optimization", {}).items():
        name = key.removeprefix("stage3_")
        stages = (3,) if name in _STAGE_3 else (1, 2) if name in _STAGES_1_2 else (1, 2, 3)
        if key != "stage" and derived.zero_stage not in stages:
            why = f"it is of ZeRO stage {' and '.join(map(str, stages))}, this run's is {derived.zero_stage}"
            yield _line(f"engine.deepspeed.zero_optimization.{key}", value, why)


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = getattr(tree, part)
    return tree


def _is_set(config: RunConfig, key: str) -> bool:
    value = _value(config, key)
    return value != () and value != _value(_DEFAULT, key)


def _line(key: str, value: Any, why: str) -> str:
    shown = list(value) if isinstance(value, tuple) else value
    return f"{key}={str(shown).lower() if isinstance(value, bool) else shown} has no effect: {why}"
