"""A key that is set without effect gives one warning; shipped configs have none."""

from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.derived import derive
from pipeline.unused_keys import (
    _NO_EFFECT_EMBEDDED,
    _NO_EFFECT_ON_CLUSTER,
    _RULES,
    _is_set,
    unused_key_warnings,
)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
REQUIRED = {
    "finetune.yaml": ["model.weights=w"],
    "finetune_imagenet1k.yaml": ["model.weights=w"],
    "distill.yaml": ["loss.teacher=t"],
}


def warnings(config: RunConfig, workers: int = 8, device: str = "cuda", embedded: bool = True) -> list[str]:
    derived = derive(
        config, workers=workers, cpus_per_worker=1, device=device, train_samples=10**6, val_samples=9, num_classes=10
    )
    return unused_key_warnings(config, derived, embedded)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_have_no_key_without_effect(file, device):
    config = load_config(file, *REQUIRED.get(file.name, []))
    for workers in (1, 8):
        assert warnings(config, workers, device) == warnings(config, workers, device, embedded=False) == []


NO_EFFECT = {
    "optim.betas=[0.8,0.99]": "optim.betas=[0.8, 0.99] has no effect: it applies to adamw, lamb and muon, optim",
    "optim.eps=1e-6": "optim.eps=1e-06 has no effect: it applies to adamw, lamb and muon",
    "optim.momentum=0.5 optim.name=adamw": "optim.momentum=0.5 has no effect: it applies to sgd, lars and muon",
    "optim.nesterov=false optim.momentum=0": "optim.nesterov=false has no effect",
    "optim.lr_base_batch=512": "optim.lr_base_batch=512 has no effect: optim.lr_scaling is none",
    "schedule.milestones=[5]": "schedule.milestones=[5.0] has no effect: it applies to step, schedule.name is cosine",
    "schedule.gamma=0.2 schedule.name=step schedule.milestones=[]": "schedule.gamma=0.2 has no effect",
    "schedule.pct_start=0.2": "schedule.pct_start=0.2 has no effect: it applies to one-cycle",
    "schedule.min_lr_ratio=0.1 schedule.name=step": "schedule.min_lr_ratio=0.1 has no effect",
    "loss.distillation_alpha=0.3": "loss.distillation_alpha=0.3 has no effect: loss.teacher is null",
    "loss.distillation_temperature=2": "loss.distillation_temperature=2.0 has no effect",
    "loss.teacher=t loss.distillation_alpha=0": "loss.teacher=t has no effect: loss.distillation_alpha is 0",
    "loss.teacher=t loss.distillation_alpha=1 loss.label_smoothing=0.1": "loss.label_smoothing=0.1 has no effect",
    "ema.warmup=false": "ema.warmup=false has no effect: there is no EMA of the weights: ema.decay is null",
    "augment.randaugment_num_ops=3 augment.auto_augment=trivialaugment": "augment.randaugment_num_ops=3 has no effect",
    "augment.randaugment_magnitude=3": "augment.randaugment_magnitude=3 has no effect",
    "augment.erase_fill=noise": "augment.erase_fill=noise has no effect: augment.erase_prob is 0",
    "augment.mix_prob=0.5": "augment.mix_prob=0.5 has no effect",
    "augment.mixup_alpha=0.2 augment.mix_prob=0": "augment.mixup_alpha=0.2 has no effect: augment.mix_prob is 0",
    "augment.cutmix_alpha=1 augment.mix_switch_prob=0.3": "augment.mix_switch_prob=0.3 has no effect",
    "data.window=4": "data.window=4 has no effect: data.shuffle is full",
    "data.stage=/fast data.stage_limit=200GB": "data.stage_limit=200GB has no effect: data.shuffle is full",
    "train.nan_limit=3": "train.nan_limit=3 has no effect: train.on_nan is stop",
    "train.profile_steps=[5,999999]": "train.profile_steps=[5, 999999] has no effect: the run ends at step 351563",
    "checkpoint.every_samples=99999999": "checkpoint.every_samples=99999999 has no effect: the run ends at 900",
    "checkpoint.keep_every_epochs=91": "checkpoint.keep_every_epochs=91 has no effect: the run ends at epoch 90",
    "cluster.resize_interval_s=9 cluster.workers=8": "cluster.resize_interval_s=9.0 has no effect: the number of work",
    "cluster.replacement_timeout_s=99 cluster.max_failures=0": "cluster.replacement_timeout_s=99.0 has no effect",
    "cluster.placement=spread": "cluster.placement=spread has no effect: there is one node",
    "engine.deepspeed={zero_optimization: {overlap_comm: true}} engine.zero_stage=0": "engine.deepspeed.zero_optimiza"
    "tion.overlap_comm=true has no effect: it applies to ZeRO stage 1, 2 and 3, this run uses stage 0",
    "engine.deepspeed={zero_optimization: {stage3_max_live_parameters: 9}} engine.zero_stage=1": "engine.deepspeed."
    "zero_optimization.stage3_max_live_parameters=9 has no effect: it applies to ZeRO stage 3, this run uses stage 1",
}


@pytest.mark.parametrize("overrides", NO_EFFECT)
def test_an_unused_key_gives_one_warning_and_so_does_the_saved_config(overrides, tmp_path):
    (tmp_path / "c.yaml").write_text("{}")
    config = load_config(tmp_path / "c.yaml", *(overrides.split(" ") if "{" not in overrides else _split(overrides)))
    (line,) = warnings(config)
    assert line.startswith(NO_EFFECT[overrides])
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert warnings(load_config(tmp_path / "saved.yaml")) == [line]


def _split(overrides: str) -> list[str]:
    first, _, rest = overrides.partition("}} ")
    return [f"{first}}}}}" if rest else first, *filter(None, [rest])]


@pytest.mark.parametrize(
    ("workers", "device", "tree", "line"),
    [
        (
            1,
            "cuda",
            {"engine": {"zero_stage": 2}},
            "engine.zero_stage=2 has no effect: there is one worker, so nothing",
        ),
        (
            1,
            "cuda",
            {"engine": {"communication_data_type": "bf16"}},
            "engine.communication_data_type=bf16 has no effect: there is one",
        ),
        (1, "cuda", {"engine": {"reduce_bucket_size": 7}}, "engine.reduce_bucket_size=7 has no effect: there is one"),
        (1, "cuda", {"engine": {"sync_batch_norm": True}}, "engine.sync_batch_norm=true has no effect"),
        (8, "cpu", {"engine": {"offload_optimizer": True}}, "engine.offload_optimizer=true has no effect"),
        (
            8,
            "cpu",
            {"train": {"on_out_of_memory": "halve"}},
            "train.on_out_of_memory=halve has no effect: it applies to GPUs",
        ),
    ],
)
def test_warnings_that_depend_on_workers_and_device(workers, device, tree, line):
    config = RunConfig.model_validate(tree)
    (found,) = warnings(config, workers, device)
    assert found.startswith(line)
    assert warnings(config, 8, "cuda") == []
    elastic = RunConfig.model_validate(tree | {"cluster": {"workers": {"min": 1, "max": 8}}})
    assert warnings(elastic, workers, device) == ([] if workers == 1 else [found])  # the number of workers may grow


def test_a_cluster_has_its_own_dashboard_and_may_have_several_nodes():
    config = RunConfig.model_validate({"cluster": {"dashboard_port": 8265, "placement": "spread"}})
    assert warnings(config, embedded=False) == [
        "cluster.dashboard_port=8265 has no effect: the run joins a cluster, which has its own dashboard"
    ]


def test_an_empty_list_counts_as_not_set():
    assert warnings(RunConfig.model_validate({"schedule": {"milestones": []}})) == []


def test_all_rules_name_existing_keys():
    assert not any(_is_set(RunConfig(), key) for rule in _RULES for key in rule.keys)
    assert not any(_is_set(RunConfig(), key) for key in (*_NO_EFFECT_EMBEDDED, *_NO_EFFECT_ON_CLUSTER))
