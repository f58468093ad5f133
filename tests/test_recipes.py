"""Every shipped config is loaded, planned and trained for two optimizer steps, on small images."""

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from launch.cluster.allocation import Resources
from launch.run.plan import print_plan
from launch.run.prepare import prepare, read_config
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.train.checkpoint import best_checkpoint
from pipeline.train.events import Evaluated, Event, Saved
from tests.train.settings import new_trainer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
SMALL = [
    "data.image_size=32",
    "eval.resize=32",
    "eval.crop=32",
    "train.global_batch_size=4",
    "cluster.workers=1",
    "device=cpu",
]
REQUIRED = {
    "finetune.yaml": "model.weights",
    "finetune_imagenet1k.yaml": "model.weights",
    "distill.yaml": "loss.teacher",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with four images each."""
    root = tmp_path_factory.mktemp("set")
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 40), (60 * i, 100 * label, 50)).save(root / split / name / f"{i}.jpg")
    return root


def run(file: Path, images: Path, output: Path, *overrides: str) -> tuple[list[Event], Path, str]:
    """Trains two steps; returns the events, the run's folder and the printed plan."""
    config = read_config(file, [*SMALL, f"data.root={images}", f"run.output={output}", "run.name=run", *overrides])
    if config.data.progressive_resize:
        sides = tuple((epoch, 24) for epoch, _ in config.data.progressive_resize)
        config = config.model_copy(update={"data": config.data.model_copy(update={"progressive_resize": sides})})
    prepared = prepare(config, Resources("this machine", 1, 0, embedded=True))
    console = Console(width=200, file=io.StringIO())
    print_plan(console, prepared)
    derived = prepared.derived.model_copy(update={"total_steps": 2, "total_samples": 8})
    events: list[Event] = []
    indexes = prepared.train_index, prepared.val_index
    new_trainer(
        prepared.config, derived, indexes, prepared.run_dir, events.append, pretrained=prepared.pretrained
    ).fit()
    return events, prepared.run_dir, console.file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: str(f.relative_to(CONFIGS)))
def test_a_shipped_config_plans_and_trains(file, images, tmp_path, one_rank):
    digits = ["data.root=digits://"] if file.name == "demo.yaml" else []
    start = []
    if file.name in REQUIRED:
        _, teacher, _ = run(CONFIGS / "demo.yaml", images, tmp_path, "run.name=teacher")
        start = [f"{REQUIRED[file.name]}={teacher}", "model.name=densenet_tiny"]
    elif file.parent.name == "recipes":
        start = ["model.name=densenet_tiny"]
    events, run_dir, plan = run(file, images, tmp_path, *start, *digits)
    assert any(isinstance(event, Saved) for event in events)
    evaluated = [e.weights for e in events if isinstance(e, Evaluated)]
    config = read_config(best_checkpoint(run_dir) / "config.yaml", [])
    assert evaluated == (["raw"] if config.ema.decay is None else ["raw", "ema"])
    assert f"{config.optim.name}, schedule {config.schedule.name}" in plan
    if "model.weights" in REQUIRED.get(file.name, ""):
        assert f"{best_checkpoint(tmp_path / 'teacher')}" in plan


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_required_value_is_an_error(name):
    with pytest.raises(ConfigError, match=f"requires {REQUIRED[name]}: add {REQUIRED[name]}=VALUE"):
        load_config(CONFIGS / "recipes" / name)


def test_recipes_state_the_expected_accuracy_and_whether_they_have_been_run():
    for file in (CONFIGS / "recipes").glob("*.yaml"):
        words = " ".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
        assert "run" in words and ("Expected" in words or "To beat" in words or "fast.yaml" in words), file
