"""Configs: includes, overrides, error messages and derived values."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.derived import derive
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def derived(config: RunConfig, workers: int = 1, samples: int = 1000):
    return derive(
        config, workers=workers, cpus_per_worker=1, device="cpu", train_samples=samples, val_samples=10, num_classes=10
    )


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_load_and_survive_a_round_trip(file, tmp_path):
    config = load_config(file)
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


def test_own_keys_override_included_keys_and_overrides_override_both(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {epochs: 1, global_batch_size: 8}\noptim: {lr: 0.5}\n")
    (tmp_path / "run.yaml").write_text("include: base.yaml\ntrain: {epochs: 2}\n")
    config = load_config(tmp_path / "run.yaml", "optim.lr=1e-3")
    assert (config.train.epochs, config.train.global_batch_size, config.optim.lr) == (2, 8, 0.001)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "train.epoch: unknown key; did you mean 'train.epochs'?"),
        ("zzz=3", "zzz: unknown key; known: run, device, model"),
        ("train.epochs=many", "train.epochs: must be a valid number, .*; got 'many'"),
        ("optim.lr=-1", "optim.lr: must be greater than 0; got -1"),
        (
            "cluster.workers=0",
            "cluster.workers: must be greater than or equal to 1, .* or must be {min: ..., max: ..., step: ...}; got 0",
        ),
        ("cluster.workers={mn: 1, max: 3}", "cluster.workers.mn: unknown key; did you mean 'cluster.workers.min'"),
        ("cluster.workers={min: 4, max: 3}", "min=4 must not exceed max=3"),
        ("cluster.env={HF_TOKEN: x}", "cluster.env: must not contain HF_TOKEN, since configs are saved and logged"),
        ("device=gpu", "device: must be 'auto', or must be 'cpu' or 'cuda'; got 'gpu'"),
        ("run.name=../up", "run.name: must be a plain folder name"),
        ("schedule.warmup_epochs=90", "schedule.warmup_epochs=90 must be shorter than train.epochs=90"),
        ("train.epochs=60", r"schedule.milestones=\[30.0, 60.0\] must be less than train.epochs=60"),
        (
            "checkpoint.allow_changed=[optim.lr]",
            "checkpoint.allow_changed.0: must be 'model.name', 'run.seed', .*'data'",
        ),
        ("ema.decay=1.5", "ema.decay: must be less than 1; got 1.5"),
        ("model.drop_rate=1", "model.drop_rate: must be less than 1; got 1"),
        ("optim.betas=[0.9, 1.0]", r"optim: betas=\[0.9, 1.0\] must each be below 1"),
        (
            "optim.name=lamb engine.zero_stage=1",
            "optim.name=lamb computes on whole weight tensors, which ZeRO stage 1 shards: set engine.zero_stage=0",
        ),
        ("train.profile_steps=[9, 3]", r"profile_steps=\[9, 3\] must be \[first, last\] with first <= last"),
        (
            "optim.name=adam",
            r"optim.name: must be 'sgd', 'adamw', 'lamb', 'lars' or 'muon' \(did you mean 'adamw'\?\); got 'adam'",
        ),
        (
            "data.progressive_resize=[[90, 160]]",
            r"data.progressive_resize=\[\[90.0, 160\]\] must have epochs less than train.epochs=90",
        ),
        ("finetune.freeze_blocks=5", "finetune.freeze_blocks: must be less than or equal to 4"),
        ("eval.crop=300", "crop=300 must not exceed resize=256"),
        ("train.epochs", "override 'train.epochs' is not of the form key=value"),
        ("tracking.uri=http://me:hunter2@host", "tracking.uri: must not contain a password"),
        ("data.mean=[1", "override 'data.mean=\\[1' cannot be applied"),
    ],
)
def test_an_invalid_override_gives_an_error_with_the_allowed_values(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(CONFIGS / "densenet121.yaml", *re.split(r" (?=\w+\.\w+=)", override))
    assert "hunter2" not in str(error.value)


def test_the_message_lists_all_problems():
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS / "densenet121.yaml", "train.epochs=-1", "optim.momentum=2")
    assert "train.epochs" in str(error.value)
    assert "optim.momentum" in str(error.value)


def test_missing_broken_and_circular_files(tmp_path):
    with pytest.raises(ConfigError, match=r"densenet12.yaml does not exist. Similar: densenet121.yaml"):
        load_config(CONFIGS / "densenet12.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must contain `key: value` lines"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    with pytest.raises(ConfigError, match=r"include each other: a.yaml -> b.yaml"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("include: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"gone.yaml \(included by .*c.yaml\) does not exist"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("workers", "most", "device_batch", "accumulation_steps"),
    [(1, 64, 64, 4), (2, 64, 64, 2), (4, 64, 64, 1), (2, 50, 32, 4)],
)
def test_gradient_accumulation_keeps_the_global_batch_at_any_number_of_workers(
    workers, most, device_batch, accumulation_steps
):
    config = RunConfig.model_validate({"train": {"global_batch_size": 256, "max_device_batch_size": most}})
    d = derived(config, workers)
    assert (d.device_batch_size, d.gradient_accumulation_steps) == (device_batch, accumulation_steps)
    assert d.global_batch_size == 256


def test_steps_cover_all_epochs_without_an_extra_batch():
    config = RunConfig.model_validate({"train": {"global_batch_size": 64, "epochs": 3}})
    d = derived(config)  # 3,000 samples are 46.9 batches
    assert (d.total_steps, d.total_samples) == (47, 47 * 64)


def test_batches_that_cannot_be_split_or_filled_are_errors():
    config = RunConfig.model_validate({"train": {"global_batch_size": 64}})
    with pytest.raises(ConfigError, match="64 cannot be divided among 3 workers: set it to 63 or 66"):
        derived(config, workers=3)
    with pytest.raises(ConfigError, match="64 is more than the 40 training images"):
        derived(config, samples=40)


def test_the_evaluation_preset_sets_the_default_sizes_and_interpolation(tmp_path):
    timm = RunConfig.model_validate({"eval": {"transform": "timm"}}).eval
    assert (timm.resize, timm.crop, timm.interpolation) == (256, 224, "bicubic")
    other = RunConfig.model_validate({"eval": {"transform": "timm", "crop": 288, "interpolation": "bilinear"}}).eval
    assert (other.resize, other.interpolation) == (329, "bilinear")
    plain = RunConfig.model_validate({"eval": {"crop": 192}}).eval
    assert (plain.resize, plain.interpolation) == (219, "bilinear")
    assert "resize: 219" in RunConfig(eval=plain).to_yaml()  # a saved config does not depend on defaults
    with pytest.raises(ValueError, match="transform"):
        RunConfig.model_validate({"eval": {"transform": "keras"}})


def test_progressive_resize_sets_the_image_size_per_epoch():
    data = RunConfig.model_validate({"data": {"progressive_resize": [[2, 128], [5.5, 160]]}}).data
    assert [data.image_size_at(epoch) for epoch in (0, 1.99, 2, 5.4, 5.5, 80)] == [128, 128, 160, 160, 224, 224]
    for wrong in ([[2, 128], [1, 160]], [[0, 128]], [[1, 4]]):
        with pytest.raises(ValueError, match="pairs with increasing epochs"):
            RunConfig.model_validate({"data": {"progressive_resize": wrong}})


def test_the_data_uri_must_not_contain_a_password():
    with pytest.raises(ValueError, match="must not contain a password"):
        RunConfig.model_validate({"data": {"root": "s3://me:secret@bucket/set", "stage": "/fast"}})


def test_one_cycle_takes_no_warmup():
    with pytest.raises(ValidationError, match="one-cycle has its own warmup: set schedule.warmup_epochs=0"):
        RunConfig.model_validate({"schedule": {"name": "one-cycle", "warmup_epochs": 1}})


@pytest.mark.parametrize("memory", ["shared-stats", "fused"])
def test_shared_statistics_with_zero_stage_3_or_sync_batch_norm_are_an_error(memory):
    with pytest.raises(ValidationError, match=r"engine.zero_stage=3 .* model.memory=shared-stats or fused"):
        RunConfig.model_validate({"model": {"memory": memory}, "engine": {"zero_stage": 3}})
    with pytest.raises(ValidationError, match=f"engine.sync_batch_norm and model.memory={memory} both compute"):
        RunConfig.model_validate({"model": {"memory": memory}, "engine": {"sync_batch_norm": True}})


@pytest.mark.parametrize(
    ("workers", "sections", "stage"),
    [
        (1, {}, 0),
        (2, {}, 0),
        (2, {"engine": {"zero_stage": 3}}, 3),
        (1, {"engine": {"offload_optimizer": True}}, 1),
    ],
)
def test_offload_optimizer_sets_the_default_zero_stage(workers, sections, stage):
    config = RunConfig.model_validate({"train": {"epochs": 99}} | sections)
    sizes = {"train_samples": 1000, "val_samples": 10, "num_classes": 10}
    assert derive(config, workers=workers, cpus_per_worker=1, device="cpu", **sizes).zero_stage == stage
    with pytest.raises(ValidationError, match="engine.offload_optimizer needs engine.zero_stage=1, 2 or 3"):
        RunConfig.model_validate({"optim": {"name": "lamb"}, "engine": {"offload_optimizer": True}})


KEYS = [
    f"{section}.{key}" if hasattr(field.annotation, "model_fields") else section
    for section, field in RunConfig.model_fields.items()
    for key in getattr(field.annotation, "model_fields", [""])
]
plain = st.none() | st.booleans() | st.integers(-10, 10**6) | st.floats(-10, 1e6) | st.text(max_size=12)
values = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=6), plain, max_size=2)


@settings(max_examples=300)
@given(chosen=st.dictionaries(st.sampled_from(KEYS), values, max_size=3))
def test_any_values_give_a_config_that_survives_a_round_trip_or_an_error_that_names_the_file(chosen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tree: dict = {}
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        if name:
            tree.setdefault(section, {})
            if isinstance(tree[section], dict):
                tree[section][name] = value
        else:
            tree[section] = value
    (folder / "any.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    try:
        config = load_config(folder / "any.yaml")
    except ConfigError as error:
        assert "any.yaml" in str(error)
        return
    (folder / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(folder / "again.yaml") == config


@settings(max_examples=200)
@given(content=st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode()))
@example(content=b"literal[: 1")
@example(content=b"cluster: {workers: {'literal[': 1, min: 1}}")
def test_any_file_is_a_config_or_an_error(content, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "any.yaml"
    file.write_bytes(content)
    try:
        load_config(file)
    except ConfigError as error:
        assert "any.yaml" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "007",
        "1e5",
        "2024_01_01",
        "12:30",
        "yes",
        "a #1",
        "#1",
        "0x1F",
        "{a}",
        "a: b",
        "*x",
        "&x y",
        "@x",
        "\u00e9 \U0001f600",
    ],
)
def test_keys_of_type_string_take_overrides_literally(text, tmp_path):
    """As YAML, `007` is 7, and ` #` starts a comment, so the run would use another folder than requested."""
    config = load_config(CONFIGS / "demo.yaml", f"data.root={text}", f"cluster.env.ANY={text}")
    assert (config.data.root, config.cluster.env["ANY"]) == (text, text)
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


LOOK_ALIKES = [
    "1e5",
    "0x1f",
    "0o17",
    "1_0",
    "1.",
    ".5e3",
    ".inf",
    "+1",
    "on",
    "No",
    "null",
    "~",
    "12:30:00",
    "2026-01-01",
]
LOOK_ALIKES += [
    "${x}",
    "\\${x}",
    "\\\\${",
    "$$",
    "\\",
    "'\"",
    "a: b",
    " #",
    "- ",
    "?",
    "!x",
    "&a",
    "*a",
    "<<",
    "=",
    "\n",
    "\t",
]


@settings(max_examples=150)
@given(text=st.lists(st.sampled_from(LOOK_ALIKES) | st.text(max_size=4), min_size=1, max_size=3).map("".join))
def test_any_text_is_written_and_read_as_the_same(text, tmp_path_factory):
    """Text that looks like a number, a date, an interpolation or YAML's syntax stays text in a saved config."""
    assume("???" not in text)  # a required value in OmegaConf
    try:
        config = RunConfig(data={"root": text}, cluster={"env": {"ANY": text}})
    except ValidationError:
        return
    file = tmp_path_factory.mktemp("config") / "again.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(file) == config


def test_string_overrides_may_be_null_quoted_or_interpolated():
    overrides = ["run.name=null", "model.weights=", "tracking.experiment='null'"]
    overrides += ["run.output=out", "data.root=${run.output}/x"]
    config = load_config(CONFIGS / "demo.yaml", *overrides)
    assert (config.run.name, config.model.weights) == (None, None)
    assert (config.tracking.experiment, config.data.root) == ("null", "out/x")


@settings(max_examples=200)
@given(override=st.text(max_size=40))
def test_any_override_is_applied_or_an_error(override):
    try:
        load_config(CONFIGS / "demo.yaml", override)
    except ConfigError as error:
        assert str(error)


@settings(max_examples=200)
@given(
    batch=st.integers(1, 4096),
    most=st.integers(1, 512),
    workers=st.integers(1, 64),
    samples=st.integers(1, 10**6),
    epochs=st.floats(0.1, 100),
)
def test_derived_values_fill_the_global_batch_or_the_error_names_the_key(batch, most, workers, samples, epochs):
    tree = {"train": {"global_batch_size": batch, "max_device_batch_size": most, "epochs": epochs}}
    tree["schedule"] = {"name": "cosine", "warmup_epochs": 0}
    config = RunConfig.model_validate(tree)
    try:
        d = derived(config, workers, samples)
    except ConfigError as error:
        assert re.search(r"train\.(global_batch_size|epochs)=", str(error)), error
        return
    assert d.device_batch_size * d.gradient_accumulation_steps * d.workers == batch
    assert d.device_batch_size <= most
    assert d.total_samples == d.total_steps * batch
