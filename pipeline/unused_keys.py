"""Warnings about config keys that are set but have no effect in combination with the other keys.

A key counts as set if its value differs from the default, so a saved config, which has all keys, gives the same
warnings as the original file. An empty list counts as not set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config import Elastic, RunConfig
from pipeline.derived import Derived
from pipeline.extension_points import OPTIMIZERS, SCHEDULES
from pipeline.formatting import join_names

_DEFAULT = RunConfig()
_Predicate = Callable[[RunConfig, Derived], bool]


@dataclass(frozen=True)
class _Rule:
    """The keys have an effect where `has_effect` is true; otherwise `reason` says why not.

    `has_effect` and `reason` take the config `c` and the derived values `d`; `readers` in `reason` maps a key to the
    optimizers or schedules that read it.
    """

    keys: tuple[str, ...]
    has_effect: _Predicate
    reason: str


_RULES = (
    _Rule(
        ("optim.momentum",),
        lambda c, d: "momentum" in OPTIMIZERS[c.optim.name].reads,
        "it applies to {readers[momentum]}, optim.name is {c.optim.name}",
    ),
    _Rule(
        ("optim.nesterov",),
        lambda c, d: "nesterov" in OPTIMIZERS[c.optim.name].reads and c.optim.momentum > 0,
        "it applies to {readers[nesterov]} with momentum; optim.name is {c.optim.name}, "
        "optim.momentum {c.optim.momentum:g}",
    ),
    _Rule(
        ("optim.betas",),
        lambda c, d: "betas" in OPTIMIZERS[c.optim.name].reads,
        "it applies to {readers[betas]}, optim.name is {c.optim.name}",
    ),
    _Rule(
        ("optim.eps",),
        lambda c, d: "eps" in OPTIMIZERS[c.optim.name].reads,
        "it applies to {readers[eps]}, optim.name is {c.optim.name}",
    ),
    _Rule(("optim.lr_base_batch",), lambda c, d: c.optim.lr_scaling != "none", "optim.lr_scaling is none"),
    _Rule(
        ("schedule.milestones",),
        lambda c, d: "milestones" in SCHEDULES[c.schedule.name].reads,
        "it applies to {readers[milestones]}, schedule.name is {c.schedule.name}",
    ),
    _Rule(
        ("schedule.gamma",),
        lambda c, d: (
            "gamma" in SCHEDULES[c.schedule.name].reads and (c.schedule.name != "step" or bool(c.schedule.milestones))
        ),
        "it applies to {readers[gamma]} with milestones; schedule.name is {c.schedule.name}",
    ),
    _Rule(
        ("schedule.pct_start",),
        lambda c, d: "pct_start" in SCHEDULES[c.schedule.name].reads,
        "it applies to {readers[pct_start]}, schedule.name is {c.schedule.name}",
    ),
    _Rule(
        ("schedule.min_lr_ratio",),
        lambda c, d: "min_lr_ratio" in SCHEDULES[c.schedule.name].reads,
        "it applies to {readers[min_lr_ratio]}, schedule.name is {c.schedule.name}",
    ),
    _Rule(("loss.distillation_alpha",), lambda c, d: c.loss.teacher is not None, "loss.teacher is null"),
    _Rule(
        ("loss.distillation_temperature",),
        lambda c, d: c.loss.teacher is not None and c.loss.distillation_alpha > 0,
        "there is no distillation loss: loss.teacher is null or loss.distillation_alpha is 0",
    ),
    _Rule(("loss.teacher",), lambda c, d: c.loss.distillation_alpha > 0, "loss.distillation_alpha is 0"),
    _Rule(
        ("loss.label_smoothing", "loss.name"),
        lambda c, d: c.loss.teacher is None or c.loss.distillation_alpha < 1,
        "loss.distillation_alpha is 1: the loss uses the teacher's logits only, not the labels",
    ),
    _Rule(("ema.warmup",), lambda c, d: c.ema.decay is not None, "there is no EMA of the weights: ema.decay is null"),
    _Rule(
        ("augment.randaugment_num_ops", "augment.randaugment_magnitude"),
        lambda c, d: c.augment.auto_augment == "randaugment",
        "it applies to randaugment, augment.auto_augment is {c.augment.auto_augment}",
    ),
    _Rule(
        ("augment.erase_scale", "augment.erase_ratio", "augment.erase_fill"),
        lambda c, d: c.augment.erase_prob > 0,
        "augment.erase_prob is 0",
    ),
    _Rule(
        ("augment.mix_prob",),
        lambda c, d: c.augment.mixes_images,
        "augment.mixup_alpha and augment.cutmix_alpha are both 0",
    ),
    _Rule(
        ("augment.mixup_alpha", "augment.cutmix_alpha"), lambda c, d: c.augment.mix_prob > 0, "augment.mix_prob is 0"
    ),
    _Rule(
        ("augment.mix_switch_prob",),
        lambda c, d: c.augment.mixup_alpha > 0 and c.augment.cutmix_alpha > 0,
        "it chooses between mixup and CutMix, and one of them is off (alpha 0)",
    ),
    _Rule(("data.window",), lambda c, d: c.data.shuffle == "windowed", "data.shuffle is {c.data.shuffle}"),
    _Rule(
        ("data.stage_limit",),
        lambda c, d: c.data.shuffle == "windowed",
        "data.shuffle is full, so everything is copied, and it fits; windowed starts without waiting for the copy",
    ),
    _Rule(("train.nan_limit",), lambda c, d: c.train.on_nan != "stop", "train.on_nan is stop"),
    _Rule(("train.on_out_of_memory",), lambda c, d: d.device == "cuda", "it applies to GPUs, this run is on the CPU"),
    _Rule(
        ("train.profile_steps",),
        lambda c, d: c.train.profile_steps is None or c.train.profile_steps[1] <= d.total_steps,
        "the run ends at step {d.total_steps}, before the profile is complete",
    ),
    _Rule(
        ("engine.zero_stage",),
        lambda c, d: d.workers > 1 or c.engine.zero_stage == 0 or c.engine.offload_optimizer,
        "there is one worker, so nothing is sharded",
    ),
    _Rule(
        ("engine.offload_optimizer",),
        lambda c, d: d.device == "cuda",
        "this run is on the CPU, so the optimizer state is in CPU memory already",
    ),
    _Rule(
        ("engine.deterministic", "engine.tf32"),
        lambda c, d: d.device == "cuda",
        "it applies to GPUs, this run is on the CPU",
    ),
    _Rule(
        ("engine.sync_batch_norm",),
        lambda c, d: d.workers > 1 and not c.finetune.freeze_batch_norm,
        "there is one worker, or finetune.freeze_batch_norm is true",
    ),
    _Rule(("engine.communication_data_type",), lambda c, d: d.workers > 1, "there is one worker"),
    _Rule(
        ("engine.reduce_bucket_size",),
        lambda c, d: d.workers > 1 or d.zero_stage > 0,
        "there is one worker, and ZeRO stage 0",
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
        "cluster.max_failures is 0: the run ends after a worker failure",
    ),
)
_NO_EFFECT_EMBEDDED = ("cluster.placement",)  # an embedded Ray has one node
_NO_EFFECT_ON_CLUSTER = ("cluster.dashboard_port",)  # the cluster has its own dashboard

# Keys of DeepSpeed's `zero_optimization` that only some of stages 1 to 3 read, without the prefix `stage3_`.
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


def unused_key_warnings(config: RunConfig, derived: Derived, embedded: bool) -> list[str]:
    """Returns one warning for each key that is set without effect.

    Args:
        config: The run's config.
        derived: The values derived from it.
        embedded: Whether the run starts its own Ray instead of joining a cluster.
    """
    readers = _readers()
    lines = [
        _warning(key, _value(config, key), rule.reason.format(c=config, d=derived, readers=readers))
        for rule in _RULES
        if not _elastic_may_change(config, rule) and not rule.has_effect(config, derived)
        for key in rule.keys
        if _is_set(config, key)
    ]
    for key in _NO_EFFECT_EMBEDDED if embedded else _NO_EFFECT_ON_CLUSTER:
        reason = "there is one node" if embedded else "the run joins a cluster, which has its own dashboard"
        if _is_set(config, key) and not any(line.startswith(f"{key}=") for line in lines):
            lines.append(_warning(key, _value(config, key), reason))
    return lines + list(_unused_zero_keys(config, derived))


def _readers() -> dict[str, str]:
    """Maps each key to the optimizers or schedules that read it, plugins included, as text."""
    readers: dict[str, list[str]] = {}
    for registry in (OPTIMIZERS, SCHEDULES):
        for name, entry in registry.items():
            for key in entry.reads:
                readers.setdefault(key, []).append(name)
    return {key: join_names(names, "and") for key, names in readers.items()}


def _elastic_may_change(config: RunConfig, rule: _Rule) -> bool:
    """Returns whether the rule depends on the number of workers, and that may change during the run."""
    return "one worker" in rule.reason and isinstance(config.cluster.workers, Elastic)


def _unused_zero_keys(config: RunConfig, derived: Derived) -> Iterator[str]:
    for key, value in config.engine.deepspeed.get("zero_optimization", {}).items():
        name = key.removeprefix("stage3_")
        stages = (3,) if name in _STAGE_3 else (1, 2) if name in _STAGES_1_2 else (1, 2, 3)
        if key != "stage" and derived.zero_stage not in stages:
            names = join_names([str(stage) for stage in stages], "and")
            reason = f"it applies to ZeRO stage {names}, this run uses stage {derived.zero_stage}"
            yield _warning(f"engine.deepspeed.zero_optimization.{key}", value, reason)


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = getattr(tree, part)
    return tree


def _is_set(config: RunConfig, key: str) -> bool:
    value = _value(config, key)
    return value != () and value != _value(_DEFAULT, key)


def _warning(key: str, value: Any, reason: str) -> str:
    shown = list(value) if isinstance(value, tuple) else value
    return f"{key}={str(shown).lower() if isinstance(value, bool) else shown} has no effect: {reason}"
