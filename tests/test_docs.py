"""The documentation: commands run, links resolve, the table of config keys is up to date."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import page
from pipeline.config_file import describe
from pipeline.data.tools.image_checks import FINDING_KINDS
from tests.data import synthetic

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text()
DOCUMENTS = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")])


def commands() -> list[list[str]]:
    """Returns every command of README's shell blocks, split into words, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_the_key_table_is_up_to_date():
    assert (PROJECT / "docs" / "config.md").read_text() == describe(), (
        "run `python -m pipeline.config_file > docs/config.md`"
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_point_to_existing_files(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_make_targets_exist():
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=PROJECT, check=True, capture_output=True)


def test_training_commands_can_be_planned(shell, tmp_path):
    """README's training commands, with a small data set instead of ImageNet."""
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            Image.new("RGB", (300, 260)).save(tmp_path / "set" / split / name / "1.JPEG")
    small = ["train.global_batch_size=2", f"run.output={tmp_path}"]
    replacements = {"data.root=/data/imagenet": f"data.root={tmp_path / 'set'}", "run.output=/shared/runs": small[1]}
    planned = 0
    for words in commands():
        if "densenet" in words and words[words.index("densenet") + 1] in ("plan", "train"):
            arguments = [replacements.get(word, word) for word in words[words.index("densenet") + 2 :]]
            with_small = "configs/demo.yaml" not in arguments and "--cluster" not in arguments
            done = shell("densenet", "plan", *arguments, *(small if with_small else []))
            assert done.returncode == 0, done.stdout
            assert ("estimate, not a measurement" if "--cluster" in words else "global batch") in done.stdout
            planned += 1
    assert planned == 4


def test_kubernetes_commands_render(shell):
    """README's and the Kubernetes guide's `k8s render` commands write complete manifests."""
    found = [words for words in commands() if words[:2] == ["densenet", "k8s"]]
    guide = (PROJECT / "docs" / "kubernetes.md").read_text().replace("\\\n", " ")
    lines = [line for line in guide.splitlines() if line.startswith("densenet k8s render")]
    found += [shlex.split(re.split("[>|]", line)[0]) for line in lines]
    assert len(found) == 4
    kinds = {"cluster": "PriorityClass", "namespace": "PersistentVolumeClaim", "run": "RayJob"}
    for words in found:
        done = shell(*words)
        assert done.returncode == 0, done.stdout
        part = words[words.index("--part") + 1] if "--part" in words else "run"
        assert f"kind: {kinds[part]}" in done.stdout


def test_slurm_commands_render(shell):
    """README's and the cluster guide's `slurm render` commands write batch scripts."""
    guide = (PROJECT / "docs" / "cluster.md").read_text().replace("\\\n", " ").replace("CONFIG", "densenet121")
    lines = [line for line in (*README.splitlines(), *guide.splitlines()) if line.startswith("densenet slurm render")]
    assert len(lines) == 2
    for line in lines:
        done = shell(*shlex.split(re.split("[>|]", line)[0]))
        assert done.returncode == 0, done.stdout
        assert "#SBATCH --job-name=first" in done.stdout


@pytest.mark.slow
def test_the_code_in_api_md_runs(tmp_path):
    """All code blocks in order, in a subprocess and an empty folder."""
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "api.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    (tmp_path / "page.py").write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"top-1 \d+/360 = ", done.stdout)
    assert "train.epochs: must be greater than 0" in done.stdout


def test_data_commands_run(shell, tmp_path):
    """README's data commands in order, with synthetic archives instead of the downloads."""
    synthetic.write_ilsvrc(tmp_path / "downloads", synthetic.images())
    replacements = {"/downloads": str(tmp_path / "downloads"), "/data/imagenet": str(tmp_path / "imagenet")}
    ran = []
    for words in commands():
        if words[:2] == ["densenet", "data"]:
            done = shell("densenet", *(replacements.get(word, word) for word in words[1:]))
            assert done.returncode == 0, done.stdout
            ran.append(words[2])
    assert ran == ["prepare", "verify"]


def test_the_benchmarks_page_shows_the_latest_results():
    assert page.PAGE.read_text() == page.text(page.latest()), "run `python -m benchmarks.page`"


def test_messages_in_troubleshooting_exist_in_the_code():
    sources = "".join(
        file.read_text() for folder in ("pipeline", "launch") for file in (PROJECT / folder).rglob("*.py")
    )
    code = re.sub(r'"\s+f?"', "", sources)  # strings that continue on the next line
    table = (PROJECT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        assert message in code, message


def test_the_models_are_listed_with_their_sizes(shell):
    assert ["densenet", "models", "list"] in commands()
    done = shell("densenet", "models", "list")
    assert done.returncode == 0, done.stdout
    assert re.search(r"densenet264 +1000 +33,337,704 +5\.752 +224 +ImageNet 77\.85 / 93\.88", done.stdout)
    assert re.search(r"densenet_bc_l100_k12 +10 +769,162 +0\.288 +32 +CIFAR-10 95\.49", done.stdout)


def test_all_problems_that_verify_reports_are_documented():
    explained = re.findall(r"^\| `(\w+)` \| (yes|no) \|", (PROJECT / "docs" / "data.md").read_text(), re.MULTILINE)
    assert explained == [(kind, "yes" if is_error else "no") for kind, (is_error, _) in FINDING_KINDS.items()]


@pytest.mark.slow
def test_doctor_reports_no_problem(shell):
    assert ["densenet", "doctor"] in commands()
    done = shell("densenet", "doctor")
    assert done.returncode == 0, done.stdout
    for part in ("torch", "timm", "DALI", "DeepSpeed", "Ray", "MLflow"):
        assert re.search(rf"{part} +\d[\d.]+ +ok: ", done.stdout), done.stdout
