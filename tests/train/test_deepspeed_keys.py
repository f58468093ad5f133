"""`engine.deepspeed`: keys without effect are refused at any depth, without a process group."""

from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.derived import Derived, derive
from pipeline.errors import ConfigError
from pipeline.train import deepspeed_keys
from pipeline.train.deepspeed_schema import _KeyRecorder, check_deepspeed, import_deepspeed


def settings(further: dict[str, Any], zero_stage: int = 1) -> tuple[RunConfig, Derived]:
    engine = {"deepspeed": further, "zero_stage": zero_stage}
    config = RunConfig.model_validate({"engine": engine, "train": {"global_batch_size": 8}, "cluster": {"workers": 2}})
    derived = derive(config, workers=2, cpus_per_worker=1, device="cpu", train_samples=40, val_samples=8, num_classes=3)
    return config, derived


UNKNOWN = "unknown to DeepSpeed"


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"gradient_cliping": 1.0}, f"gradient_cliping: {UNKNOWN}; did you mean 'engine.deepspeed.gradient_clipping'?"),
        ({"zero_optimisation": {"stage": 2}}, f"zero_optimisation: {UNKNOWN}; did you mean 'engine.deepspeed.zero_opt"),
        ({"zzz": 1}, f"zzz: {UNKNOWN}; known: activation_checkpointing, "),
        ({"optimizer": {"type": "Adam"}}, "optimizer has no effect here: use optim.*"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler has no effect here: use optim.lr and schedule.*"),
        ({"bf16": {"enabled": True}}, "bf16 has no effect here: use train.precision"),
        ({"amp": {"enabled": True}}, "amp has no effect here: use train.precision"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning has no effect here: use data.*"),
        ({"csv_monitor": {"enabled": True}}, "csv_monitor has no effect here: use tracking.*"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0 contradicts 0.0"),
        ({"zero_optimization": True}, "zero_optimization=True must be {key: value, ...}"),
        ({"prescale_gradients": 1}, "prescale_gradients=1 must be true or false"),
        ({"gradient_predivide_factor": True}, "gradient_predivide_factor=True must be a number"),
        ({"prescale_gradients": True}, "need ZeRO stage 0, this run has stage 1"),
        ({"log_level": "loud"}, "log_level='loud' must be one of debug, info"),
        ({"communication_data_type": "fp8"}, "is refused by DeepSpeed: Invalid communication_data_type"),
        (
            {"zero_optimization": {"overlap_com": True}},
            f"zero_optimization.overlap_com: {UNKNOWN}; did you mean 'engine.deepspeed.zero_optimization.overlap_comm'",
        ),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload has no effect here: use engine.offload_optimizer"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            f"zero_optimization.offload_optimizer.devise: {UNKNOWN}; did you mean '"
            f"engine.deepspeed.zero_optimization.offload_optimizer.device'",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "disk"}}},
            "zero_optimization.offload_optimizer.device='disk': must be 'none', 'cpu' or 'nvme'",
        ),
        ({"zero_optimization": {"leaf_module": 3}}, "is refused by DeepSpeed: leaf_module configuration must be"),
        ({"flops_profiler": {"top_moduls": 2}}, f"flops_profiler.top_moduls: {UNKNOWN}; did you mean"),
        (
            {"flops_profiler": {"top_modules": "x"}},
            "flops_profiler.top_modules='x' must have type int, like the default 1",
        ),
        ({"aio": {"block_siz": 3}}, f"aio.block_siz: {UNKNOWN}; did you mean 'engine.deepspeed.aio.block_size'"),
        ({"torch_autocast": {"lower_precision_safe_module": ["a"]}}, "did you mean 'engine.deepspeed.torch_autocast."),
        ({"timers": {"thruput": {"enabled": False}}}, f"timers.thruput: {UNKNOWN}; did you mean"),
        ({"timers": {"throughput": {"enabld": False}}}, f"timers.throughput.enabld: {UNKNOWN}; did you mean"),
        ({"comms_logger": {"verbos": True}}, f"comms_logger.verbos: {UNKNOWN}; did you mean"),
    ],
)
def test_keys_without_effect_are_refused(further, message):
    with pytest.raises(ConfigError) as error:
        check_deepspeed(*settings(further))
    assert message in str(error.value)
    assert str(error.value).startswith("engine.deepspeed")


def test_keys_with_an_effect_are_accepted():
    further = {
        "aio": {"block_size": 1 << 20},
        "comms_logger": {"enabled": True},
        "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": "flops.txt"},
        "log_level": "error",
        "timers": {"throughput": {"enabled": False}},
        "torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]},
        "wall_clock_breakdown": True,
        "zero_optimization": {"overlap_comm": True, "leaf_module": {"names": ["features"]}},
    }
    merged = check_deepspeed(*settings(further))
    assert merged["zero_optimization"]["overlap_comm"] is True
    assert merged["zero_optimization"]["stage"] == 1
    scaled = {"prescale_gradients": True, "gradient_predivide_factor": 2}
    assert check_deepspeed(*settings(scaled, zero_stage=0))["prescale_gradients"] is True


def test_every_key_that_this_deepspeed_version_reads_is_supported_or_refused():
    """A new version of DeepSpeed may read further keys: each must be supported or refused on purpose."""

    class AllKeysRead(_KeyRecorder):
        def keys(self) -> Any:
            return self  # so that `key in tree.keys()` is recorded

    config, derived = settings({})
    batch = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), 1)
    schema = import_deepspeed("cpu").runtime.config
    recorded = AllKeysRead(check_deepspeed(config, derived) | batch)
    schema.DeepSpeedConfig(recorded)
    known = deepspeed_keys.SUPPORTED_KEYS.keys() | deepspeed_keys.REFUSED_KEYS.keys()
    assert "flops_profiler" in recorded.read_keys
    assert (recorded.read_keys | schema._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()) - known == set()
