"""DeepSpeed's config, derived from the run's config."""

from typing import Any

from pipeline.config import RunConfig
from pipeline.derived import Derived
from pipeline.errors import ConfigError
from pipeline.train.deepspeed_keys import SECTION, check_keys

AUTOCAST_DTYPES = {"fp32": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}


def deepspeed_config(config: RunConfig, derived: Derived) -> dict[str, Any]:
    """Returns the config for `deepspeed.initialize`.

    Mixed precision uses `torch_autocast`, never a cast of the model: weights, batch norm and its running statistics
    stay in fp32. Gradient clipping is always explicit, because DeepSpeed 0.19 clips to norm 1.0 by default; it is 0 at
    ZeRO 1-3 without CPU offload, where `pipeline.train.gradients` measures the norm and clips.

    Raises:
        ConfigError: `engine.deepspeed` contradicts other config keys, or has a key without effect.
    """
    further = config.engine.deepspeed
    check_keys(further)
    if derived.zero_stage and (further.get("prescale_gradients") or further.get("gradient_predivide_factor", 1) != 1):
        raise ConfigError(
            f"{SECTION}.prescale_gradients and gradient_predivide_factor need ZeRO stage 0, this run has stage "
            f"{derived.zero_stage}: set engine.zero_stage=0, or omit them."
        )
    zero: dict[str, Any] = {"stage": derived.zero_stage, "reduce_bucket_size": config.engine.reduce_bucket_size}
    zero |= _reduction(derived, further.get("zero_optimization", {}))
    partitioned = derived.zero_stage > 0 and not config.engine.offload_optimizer
    if partitioned and derived.zero_stage < 3:
        zero["compute_grad_norm"] = False
    if config.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": derived.device == "cuda"}
    settings = {
        "train_batch_size": derived.global_batch_size,
        "train_micro_batch_size_per_gpu": derived.device_batch_size,
        "gradient_accumulation_steps": derived.gradient_accumulation_steps,
        "gradient_clipping": 0.0 if partitioned else config.optim.clip_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": derived.precision != "fp32", "dtype": AUTOCAST_DTYPES[derived.precision]},
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},  # it synchronizes host and device twice per step
    }
    if config.engine.communication_data_type != "auto":
        settings["communication_data_type"] = config.engine.communication_data_type
    return _merge(settings, further, SECTION)


def _reduction(derived: Derived, further: dict[str, Any]) -> dict[str, Any]:
    """Returns how ZeRO 1 and 2 average gradients, except for keys in `further`.

    `reduce_scatter` is off: DeepSpeed implements it as the same all-reduce, with two copies per parameter around it.
    """
    if derived.zero_stage not in (1, 2):
        return {}
    preferred = {"reduce_scatter": False, "overlap_comm": derived.device == "cuda" and derived.workers > 1}
    return {key: value for key, value in preferred.items() if key not in further}


def _merge(settings: dict[str, Any], further: dict[str, Any], section: str) -> dict[str, Any]:
    """Merges both recursively; raises `ConfigError` where both set a key to different values."""
    merged = dict(settings)
    for key, value in further.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            merged[key] = _merge(settings[key], value, f"{section}.{key}")
        elif key in settings and settings[key] != value:
            raise ConfigError(
                f"{section}.{key}={value!r} contradicts {settings[key]!r}, which follows from the config's other keys: "
                f"omit it, and set those keys."
            )
        else:
            merged[key] = value
    return merged
