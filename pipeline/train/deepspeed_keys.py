"""Which top-level keys of DeepSpeed's own config have an effect here, and what decides in place of the others."""

import difflib
from typing import Any

from pipeline.errors import ConfigError

WHERE = "engine.deepspeed"
_NUMBER, _SWITCH, _TEXT, _SECTION = (int, float), (bool,), (str,), (dict,)

# The kind of value of each key that the engine reads with the optimizer, the rate and the data that it is given.
EFFECTIVE: dict[str, tuple[type, ...]] = {
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
    # Set from other keys; another value is a contradiction.
    "gradient_accumulation_steps": _NUMBER,
    "gradient_clipping": _NUMBER,
    "steps_per_print": _NUMBER,
    "train_batch_size": _NUMBER,
    "train_micro_batch_size_per_gpu": _NUMBER,
    "zero_allow_untested_optimizer": _SWITCH,
    "zero_force_ds_cpu_optimizer": _SWITCH,
}

_PRECISION = "train.precision decides: half precision is torch's autocast, the weights stay in fp32"
_DATA = "data.* decides: the batches do not come from DeepSpeed"
_TRACKING = "tracking.* decides: losses and rates go to MLflow"
_CHECKPOINT = "checkpoint.* decides: checkpoints are not written by DeepSpeed"
_PARALLEL = "the workers share the batch, never the layers"

# What decides, for keys that DeepSpeed knows, or knew, and that would change nothing or break the run here.
DECIDED: dict[str, str] = {
    "optimizer": "optim.* decides",
    "scheduler": "optim.lr and schedule.* decide",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "data_types": _PRECISION,
    "data_efficiency": _DATA,
    "curriculum_learning": _DATA,
    "dataloader_drop_last": _DATA,
    "managed_gradient_accumulation": "train.global_batch_size and train.max_device_batch_size decide",
    "tensorboard": _TRACKING,
    "wandb": _TRACKING,
    "csv_monitor": _TRACKING,
    "comet": _TRACKING,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "nebula": _CHECKPOINT,
    "activation_checkpointing": "model.memory decides",
    "compile": "engine.compile decides",
    "elasticity": "cluster.workers decides",
    "autotuning": "it is of DeepSpeed's own launcher; train.on_out_of_memory=halve looks for a batch that fits",
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "data_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "vocabulary_size": "it is of language models",
    "hybrid_engine": "it is of language models",
    "weight_quantization": "it is of inference",
    "disable_allgather": "DeepSpeed does not use it any more",
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
_DECIDED_ZERO: dict[str, str] = {
    "cpu_offload": "engine.offload_optimizer decides",
    "cpu_offload_param": "offload_param has taken its place",
    "cpu_offload_use_pin_memory": "pin_memory of offload_param and offload_optimizer has taken its place",
    "load_from_fp32_weights": _CHECKPOINT,
    "elastic_checkpoint": _CHECKPOINT,
    "pipeline_loading_checkpoint": _CHECKPOINT,
    "gather_16bit_weights_on_model_save": _CHECKPOINT,
    "stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "stage3_gather_fp16_weights_on_model_save": _CHECKPOINT,
    "legacy_stage1": "DeepSpeed does not use it any more",
    "zenflow": "optim.name decides: it is an optimizer of its own",
}
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def check_keys(further: dict[str, Any]) -> None:
    """Refuses keys that have no effect, and values of the wrong kind, at the top of `engine.deepspeed`.

    Raises:
        ConfigError: it names the key and what decides in its place, or the nearest known key.
    """
    for key, value in further.items():
        if key in DECIDED:
            raise ConfigError(f"{WHERE}.{key} has no effect here: {DECIDED[key]}. Leave it out.")
        if key not in EFFECTIVE:
            raise ConfigError(unknown_key(WHERE, key, [*EFFECTIVE, *DECIDED]))
        kinds = EFFECTIVE[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not _SWITCH):
            words: dict[tuple[type, ...], str] = {
                _NUMBER: "a number",
                _SWITCH: "true or false",
                _TEXT: "a word",
                _SECTION: "{key: value, ...}",
            }
            raise ConfigError(f"{WHERE}.{key}={value!r} must be {words[kinds]}.")
    for key in further.get("zero_optimization", {}):
        if key in _DECIDED_ZERO:
            raise ConfigError(
                f"{WHERE}.zero_optimization.{key} has no effect here: {_DECIDED_ZERO[key]}. Leave it out."
            )
    if further.get("log_level", "info").lower() not in _LOG_LEVELS:
        raise ConfigError(f"{WHERE}.log_level={further['log_level']!r} must be one of {', '.join(_LOG_LEVELS)}.")


def unknown_key(where: str, key: str, known: list[str]) -> str:
    """The message for a key that DeepSpeed does not read."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{where}.{near[0]}'?" if near else f"known: {', '.join(sorted(known))}."
    return f"{where}.{key}: DeepSpeed knows no such key; {hint}"
