"""The keys of DeepSpeed's config that `engine.deepspeed` supports, and those that it refuses, with the reason."""

import difflib
from typing import Any

from pipeline.errors import ConfigError

SECTION = "engine.deepspeed"
_NUMBER, _SWITCH, _TEXT, _SECTION = (int, float), (bool,), (str,), (dict,)

# Value type of each key that has an effect; optimizer, learning rate and data do not come from DeepSpeed.
SUPPORTED_KEYS: dict[str, tuple[type, ...]] = {
    "aio": _SECTION,
    "comms_logger": _SECTION,
    "communication_data_type": _TEXT,
    "disable_python_gc": _SWITCH,
    "dump_state": _SWITCH,
    "flops_profiler": _SECTION,
    "gradient_allreduce_op": _TEXT,
    "gradient_predivide_factor": _NUMBER,
    "log_level": _TEXT,
    "memory_breakdown": _SWITCH,
    "prescale_gradients": _SWITCH,
    "timers": _SECTION,
    "torch_autocast": _SECTION,
    "wall_clock_breakdown": _SWITCH,
    "zero_optimization": _SECTION,
    # Derived from the run's config; a different value is an error.
    "gradient_accumulation_steps": _NUMBER,
    "gradient_clipping": _NUMBER,
    "steps_per_print": _NUMBER,
    "train_batch_size": _NUMBER,
    "train_micro_batch_size_per_gpu": _NUMBER,
    "zero_allow_untested_optimizer": _SWITCH,
    "zero_force_ds_cpu_optimizer": _SWITCH,
}

_PRECISION = "use train.precision: mixed precision is torch.autocast, the weights stay in fp32"
_DATA = "use data.*: the batches do not come from DeepSpeed"
_TRACKING = "use tracking.*: losses and learning rates go to MLflow"
_CHECKPOINT = "use checkpoint.*: checkpoints are not written by DeepSpeed"
_PARALLEL = "only data parallelism is supported"

# Keys that DeepSpeed knows, or knew, and that would have no effect or break the run: why, or which key to use.
REFUSED_KEYS: dict[str, str] = {
    "optimizer": "use optim.*",
    "scheduler": "use optim.lr and schedule.*",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "data_types": _PRECISION,
    "data_efficiency": _DATA,
    "curriculum_learning": _DATA,
    "dataloader_drop_last": _DATA,
    "managed_gradient_accumulation": "use train.global_batch_size and train.max_device_batch_size",
    "tensorboard": _TRACKING,
    "wandb": _TRACKING,
    "csv_monitor": _TRACKING,
    "comet": _TRACKING,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "nebula": _CHECKPOINT,
    "activation_checkpointing": "use model.memory",
    "compile": "use engine.compile",
    "elasticity": "use cluster.workers",
    "autotuning": "it belongs to DeepSpeed's own launcher; train.on_out_of_memory=halve finds a batch size that fits",
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "data_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "vocabulary_size": "it applies to language models",
    "hybrid_engine": "it applies to language models",
    "weight_quantization": "it applies to inference",
    "disable_allgather": "DeepSpeed no longer uses it",
    **dict.fromkeys(
        (
            "compression_training",
            "eigenvalue",
            "graph_harvesting",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        ),
        "DeepSpeed has removed it",
    ),
}
_REFUSED_ZERO_KEYS: dict[str, str] = {
    "cpu_offload": "use engine.offload_optimizer",
    "cpu_offload_param": "use offload_param",
    "cpu_offload_use_pin_memory": "use pin_memory of offload_param and offload_optimizer",
    "load_from_fp32_weights": _CHECKPOINT,
    "elastic_checkpoint": _CHECKPOINT,
    "pipeline_loading_checkpoint": _CHECKPOINT,
    "gather_16bit_weights_on_model_save": _CHECKPOINT,
    "stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "stage3_gather_fp16_weights_on_model_save": _CHECKPOINT,
    "legacy_stage1": "DeepSpeed no longer uses it",
    "zenflow": "use optim.name: it is an optimizer of its own",
}
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def check_keys(further: dict[str, Any]) -> None:
    """Refuses top-level keys of `engine.deepspeed` without effect, and values of the wrong type.

    Raises:
        ConfigError: names the key, and which key to use instead or the nearest known key.
    """
    for key, value in further.items():
        if key in REFUSED_KEYS:
            raise ConfigError(f"{SECTION}.{key} has no effect here: {REFUSED_KEYS[key]}. Omit it.")
        if key not in SUPPORTED_KEYS:
            raise ConfigError(unknown_key(SECTION, key, [*SUPPORTED_KEYS, *REFUSED_KEYS]))
        types = SUPPORTED_KEYS[key]
        if not isinstance(value, types) or (isinstance(value, bool) and types is not _SWITCH):
            names: dict[tuple[type, ...], str] = {
                _NUMBER: "a number",
                _SWITCH: "true or false",
                _TEXT: "a string",
                _SECTION: "{key: value, ...}",
            }
            raise ConfigError(f"{SECTION}.{key}={value!r} must be {names[types]}.")
    for key in further.get("zero_optimization", {}):
        if key in _REFUSED_ZERO_KEYS:
            raise ConfigError(
                f"{SECTION}.zero_optimization.{key} has no effect here: {_REFUSED_ZERO_KEYS[key]}. Omit it."
            )
    if further.get("log_level", "info").lower() not in _LOG_LEVELS:
        raise ConfigError(f"{SECTION}.log_level={further['log_level']!r} must be one of {', '.join(_LOG_LEVELS)}.")


def unknown_key(section: str, key: str, known: list[str]) -> str:
    """Returns the error message for a key that DeepSpeed does not read."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{section}.{near[0]}'?" if near else f"known: {', '.join(sorted(known))}."
    return f"{section}.{key}: unknown to DeepSpeed; {hint}"
