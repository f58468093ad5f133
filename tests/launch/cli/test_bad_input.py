"""Bad input at the command line: one short message with a fix, exit code 2, and nothing started."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from safetensors.torch import save_file

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DEMO = str(CONFIGS / "demo.yaml")


@pytest.fixture
def refused(densenet) -> Callable[..., str]:
    """Like `densenet`, for commands that must fail before anything starts; returns the message."""

    def run(*arguments: str) -> str:
        code, printed = densenet(*arguments)
        assert code == 2, printed
        assert "error: " in printed
        assert "Traceback" not in printed
        assert len(printed.splitlines()) <= 24, "more than a screen"
        assert not ray.is_initialized()
        return printed

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A valid set of 8 + 4 images in two classes."""
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((40, 40, 3), 20 * i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{i}.jpg")
    return tmp_path / "set"


def train(images: Path, *overrides: str) -> list[str]:
    output = f"run.output={images.parent / 'out'}"
    return ["train", DEMO, f"data.root={images}", "train.global_batch_size=4", output, *overrides]


def test_a_missing_folder(refused, images):
    assert "is not a folder: set it to one that contains" in refused(*train(images / "gone"))
    assert "data.root is not set" in refused("plan", str(CONFIGS / "densenet121.yaml"))


def test_an_empty_class_folder(refused, images):
    (images / "train" / "eel").mkdir()
    assert "class folders without files: eel" in refused(*train(images))


def test_one_class_and_images_with_their_labels_in_a_file(refused, images):
    for split in ("train", "val"):
        (images / split / "cat").rename(images / split / "images")
        shutil.rmtree(images / split / "dog")
    (images / "labels.csv").write_text("file,label\n0.jpg,cat\n1.jpg,dog\n")
    message = refused(*train(images))
    assert "train has only one class, images" in message
    assert "labels.csv may hold them" in message


def test_a_fifo_and_a_broken_link_in_a_class_folder(refused, images):
    os.mkfifo(images / "train" / "cat" / "fifo.jpg")
    (images / "train" / "cat" / "lost.jpg").symlink_to("gone.jpg")
    message = refused(*train(images))
    assert "train/cat/fifo.jpg: is a FIFO, not a file" in message
    assert "train/cat/lost.jpg: is a broken link to gone.jpg" in message


def test_a_val_class_that_train_lacks(refused, images):
    (images / "val" / "dog").rename(images / "val" / "eel")
    assert "classes that the training split lacks: eel" in refused(*train(images))


def test_a_file_that_is_not_an_image_and_a_truncated_one(refused, images):
    (images / "train" / "cat" / "notes.txt").write_text("feed the cat")
    content = (images / "val" / "cat" / "0.jpg").read_bytes()
    assert "cat/notes.txt: is not an image" in refused(*train(images))
    (images / "train" / "cat" / "notes.txt").unlink()
    (images / "val" / "cat" / "0.jpg").write_bytes(content[: len(content) // 2])
    assert "cat/0.jpg: is a truncated JPEG" in refused(*train(images))


def test_a_typo_and_a_value_of_the_wrong_type(refused, images):
    assert "did you mean 'optim.lr'?" in refused(*train(images, "optim.lrr=1"))
    assert "must be a valid number" in refused(*train(images, "optim.lr=fast"))
    assert "Did you mean 'densenet121'?" in refused(*train(images, "model.name=densenet12"))


def test_weights_and_teachers_that_do_not_match(refused, images, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"features.conv0.weight": torch.zeros(8, 3, 7, 7)}, file)
    message = refused(*train(images, f"model.weights={file}"))
    assert "features.conv0.weight [8, 3, 7, 7] instead of [24, 3, 7, 7]" in message
    assert "model.weights=/nowhere is no model" in refused(*train(images, "model.weights=/nowhere"))
    assert "is a weights file without class names" in refused(*train(images, f"loss.teacher={file}"))
    assert "no model named 'big' in" in refused(*train(images, "loss.teacher=models:/big@champion"))


def test_milestones_after_the_last_epoch(refused, images):
    message = refused("plan", str(CONFIGS / "densenet121.yaml"), f"data.root={images}", "train.epochs=20")
    assert "schedule.milestones=[30.0, 60.0] must be less than train.epochs=20" in message
    message = refused(*train(images, "model.num_classes=1"))
    assert "model.num_classes=1 is less than the 2 classes in data.root" in message


def test_a_dashboard_port_in_use(refused, images):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(*train(images, f"cluster.dashboard_port={port}"))
        assert f"cluster.dashboard_port={port} cannot be used on 127.0.0.1: Address already in use" in message
        assert f"--port={port} cannot be used" in refused("ui", "--port", str(port))


def test_an_output_folder_that_cannot_be_written(refused, images):
    assert "run.output=/proc/runs cannot be written" in refused(*train(images, "run.output=/proc/runs"))
    file = images.parent / "file"
    file.touch()
    assert f"run.output={file} cannot be written" in refused(*train(images, f"run.output={file}"))


def test_batches_workers_and_devices_that_do_not_match(refused, images):
    assert "cannot be divided among 3 workers" in refused(*train(images, "cluster.workers=3"))
    assert "more than the 8 training images" in refused(*train(images, "train.global_batch_size=16"))
    assert "device=cuda needs GPUs" in refused(*train(images, "device=cuda"))


def test_an_unreachable_cluster(refused, images):
    message = refused(*train(images), "--address", "127.0.0.1:9")
    assert "the Ray address 127.0.0.1:9 is unreachable" in message


def test_an_unreachable_tracking_server(refused, images):
    message = refused(*train(images, "tracking.uri=http://127.0.0.1:9"))
    assert "the MLflow store at http://127.0.0.1:9 is unreachable" in message


def test_too_few_cores_are_a_warning_with_an_embedded_ray(densenet, images):
    code, printed = densenet("plan", *train(images, "cluster.workers=4", "cluster.cpus_per_worker=64")[1:])
    assert code == 0
    assert "warning: 4 workers with 64 CPU cores each need 256" in printed
    assert "global batch 4 = 1 per device x 1 accumulated x 4 workers" in printed


def test_an_unknown_command_gets_a_suggestion(densenet):
    code, printed = densenet("trian")
    assert code == 2
    assert "No such command 'trian'" in printed
    assert "Did you mean" in printed
