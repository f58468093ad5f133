"""What DeepSpeed is told."""

from typing import Any

from pipeline.config import RunConfig
from pipeline.derived import Derived
from pipeline.errors import ConfigError
from pipeline.train.deepspeed_keys import WHERE, check_keys

HALF = {"fp32": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}


def deepspeed_config(config: RunConfig, derived: Derived) -> dict[str, Any]:
    """Everything that DeepSpeed is told, derived from the run's config.

    Half precision is `torch_autocast`, never a cast of the model: batch norm and its running statistics stay in
    fp32. Clipping is always explicit, because DeepSpeed 0.19 clips to norm 1.0 when it is told nothing.

    Raises:
        ConfigError: `engine.deepspeed` sets what follows from other keys, or a key without effect.
    """
    further = config.engine.deepspeed
    check_keys(further)
    if derived.zero_stage and (further.get("prescale_gradients") or further.get("gradient_predivide_factor", 1) != 1):
        raise ConfigError(
            f"{WHERE}.prescale_gradients and gradient_predivide_factor need ZeRO stage 0, this run has stage "
            f"{derived.zero_stage}: set engine.zero_stage=0, or leave them out."
        )
    zero: dict[str, Any] = {"stage": derived.zero_stage, "reduce_bucket_size": config.engine.reduce_bucket_size}
    if config.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": derived.device == "cuda"}
    told = {
        "train_batch_size": derived.global_batch_size,
        "train_micro_batch_size_per_gpu": derived.device_batch_size,
        "gradient_accumulation_steps": derived.gradient_accumulation_steps,
        "gradient_clipping": config.optim.clip_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": derived.precision != "fp32", "dtype": HALF[derived.precision]},
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},  # it makes the host wait for the device twice a step
    }
    if config.engine.communication_data_type != "auto":
        told["communication_data_type"] = config.engine.communication_data_type
    return _with_further(told, further, WHERE)


def _with_further(told: dict[str, Any], further: dict[str, Any], where: str) -> dict[str, Any]:
    """Both, key by key at all depths; a key of both with another value is an error."""
    merged = dict(told)
    for key, value in further.items():
        if isinstance(value, dict) and isinstance(told.get(key), dict):
            merged[key] = _with_further(told[key], value, f"{where}.{key}")
        elif key in told and told[key] != value:
            raise ConfigError(
                f"{where}.{key}={value!r} contradicts {told[key]!r}, which follows from the config's other keys: leave "
                f"it out, and set those."
            )
        else:
            merged[key] = value
    return merged
