"""Keys that are set and that nothing reads are told, once each; shipped configs have none."""

from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.config_effects import _CLUSTER, _EMBEDDED, _RULES, _is_set, without_effect
from pipeline.config_file import load_config
from pipeline.derived import derive

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LEFT_OPEN = {"finetune.yaml": ["model.weights=w"], "distill.yaml": ["loss.teacher=t"]}


def told(config: RunConfig, workers: int = 8, device: str = "cuda", embedded: bool = True) -> list[str]:
    derived = derive(
        config, workers=workers, cpus_per_worker=1, device=device, train_samples=10**6, val_samples=9, num_classes=10
    )
    return without_effect(config, derived, embedded)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_have_no_key_without_effect(file, device):
    config = load_config(file, *LEFT_OPEN.get(file.name, []))
    for workers in (1, 8):
        assert told(config, workers, device) == told(config, workers, device, embedded=False) == []


NO_EFFECT = {
    "optim.betas=[0.8,0.99]": "optim.betas=[0.8, 0.99] has no effect: it is of adamw, lamb and muon, optim.name is sgd",
    "optim.eps=1e-6": "optim.eps=1e-06 has no effect: it is of adamw, lamb and muon",
    "optim.momentum=0.5 optim.name=adamw": "optim.momentum=0.5 has no effect: it is of sgd, lars and muon",
    "optim.nesterov=false optim.momentum=0": "optim.nesterov=false has no effect",
    "optim.lr_base_batch=512": "optim.lr_base_batch=512 has no effect: optim.lr_scaling is none",
    "schedule.milestones=[5]": "schedule.milestones=[5.0] has no effect: it is of step, schedule.name is cosine",
    "schedule.gamma=0.2 schedule.name=step schedule.milestones=[]": "schedule.gamma=0.2 has no effect",
    "schedule.pct_start=0.2": "schedule.pct_start=0.2 has no effect: it is of one-cycle",
    "schedule.min_lr_ratio=0.1 schedule.name=step": "schedule.min_lr_ratio=0.1 has no effect",
    "loss.distillation_alpha=0.3": "loss.distillation_alpha=0.3 has no effect: there is no loss.teacher",
    "loss.distillation_temperature=2": "loss.distillation_temperature=2.0 has no effect",
    "loss.teacher=t loss.distillation_alpha=0": "loss.teacher=t has no effect: loss.distillation_alpha is 0",
    "loss.teacher=t loss.distillation_alpha=1 loss.label_smoothing=0.1": "loss.label_smoothing=0.1 has no effect",
    "ema.warmup=false": "ema.warmup=false has no effect: there is no average: ema.decay is null",
    "augment.randaugment_num_ops=3 augment.auto_augment=trivialaugment": "augment.randaugment_num_ops=3 has no effect: it is of randaugment",
    "augment.randaugment_magnitude=3": "augment.randaugment_magnitude=3 has no effect",
    "augment.erase_fill=noise": "augment.erase_fill=noise has no effect: augment.erase_prob is 0",
    "augment.mix_prob=0.5": "augment.mix_prob=0.5 has no effect",
    "augment.mixup_alpha=0.2 augment.mix_prob=0": "augment.mixup_alpha=0.2 has no effect: augment.mix_prob is 0",
    "augment.cutmix_alpha=1 augment.mix_switch_prob=0.3": "augment.mix_switch_prob=0.3 has no effect",
    "data.window=4": "data.window=4 has no effect: data.shuffle is full",
    "train.nan_limit=3": "train.nan_limit=3 has no effect: train.on_nan is stop",
    "train.profile_steps=[5,999999]": "train.profile_steps=[5, 999999] has no effect: the run ends at step 351563",
    "engine.reduce_bucket_size=7 engine.zero_stage=0": "engine.reduce_bucket_size=7 has no effect: it is of ZeRO stages 1",
    "checkpoint.every_samples=99999999": "checkpoint.every_samples=99999999 has no effect: the run ends at 900",
    "checkpoint.keep_every_epochs=91": "checkpoint.keep_every_epochs=91 has no effect: the run ends at epoch 90",
    "cluster.resize_interval_s=9 cluster.workers=8": "cluster.resize_interval_s=9.0 has no effect: the number of work",
    "cluster.replacement_timeout_s=99 cluster.max_failures=0": "cluster.replacement_timeout_s=99.0 has no effect",
    "cluster.placement=spread": "cluster.placement=spread has no effect: there is one node",
    "engine.deepspeed={zero_optimization: {overlap_comm: true}} engine.zero_stage=0": "engine.deepspeed.zero_optimiza"
    "tion.overlap_comm=true has no effect: it is of ZeRO stage 1 and 2 and 3, this run's is 0",
    "engine.deepspeed={zero_optimization: {stage3_max_live_parameters: 9}} engine.zero_stage=1": "engine.deepspeed."
    "zero_optimization.stage3_max_live_parameters=9 has no effect: it is of ZeRO stage 3, this run's is 1",
}


@pytest.mark.parametrize("given", NO_EFFECT)
def test_a_key_that_nothing_reads_is_told_and_told_alike_of_the_saved_config(given, tmp_path):
    (tmp_path / "c.yaml").write_text("{}")
    config = load_config(tmp_path / "c.yaml", *(given.split(" ") if "{" not in given else _split(given)))
    (line,) = told(config)
    assert line.startswith(NO_EFFECT[given])
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert told(load_config(tmp_path / "saved.yaml")) == [line]


def _split(given: str) -> list[str]:
    first, _, rest = given.partition("}} ")
    return [f"{first}}}}}" if rest else first, *filter(None, [rest])]


@pytest.mark.parametrize(
    ("workers", "device", "given", "line"),
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
        (1, "cuda", {"engine": {"sync_batch_norm": True}}, "engine.sync_batch_norm=true has no effect"),
        (8, "cpu", {"engine": {"offload_optimizer": True}}, "engine.offload_optimizer=true has no effect"),
        (
            8,
            "cpu",
            {"train": {"on_out_of_memory": "halve"}},
            "train.on_out_of_memory=halve has no effect: it is of GPUs",
        ),
    ],
)
def test_what_depends_on_workers_and_device(workers, device, given, line):
    config = RunConfig.model_validate(given)
    (found,) = told(config, workers, device)
    assert found.startswith(line)
    assert told(config, 8, "cuda") == []
    elastic = RunConfig.model_validate(given | {"cluster": {"workers": {"min": 1, "max": 8}}})
    assert told(elastic, workers, device) == ([] if workers == 1 else [found])  # the workers may become more


def test_a_cluster_has_its_own_dashboard_and_several_nodes():
    config = RunConfig.model_validate({"cluster": {"dashboard_port": 8265, "placement": "spread"}})
    assert told(config, embedded=False) == [
        "cluster.dashboard_port=8265 has no effect: the run joins a cluster, whose dashboard it has"
    ]


def test_an_empty_list_sets_nothing():
    assert told(RunConfig.model_validate({"schedule": {"milestones": []}})) == []


def test_the_table_names_keys_that_there_are():
    assert not any(_is_set(RunConfig(), key) for rule in _RULES for key in rule.keys)
    assert not any(_is_set(RunConfig(), key) for key in (*_EMBEDDED, *_CLUSTER))
