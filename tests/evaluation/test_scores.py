"""Metrics compared with scikit-learn and by hand; labels by class name and from files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from pipeline.data.dataset import open_split
from pipeline.data.index import DatasetIndex
from pipeline.errors import DataError
from pipeline.evaluation.labels import map_labels, read_label_sets
from pipeline.evaluation.scores import NO_CLASS, best_class, calibration_error, confusion, score, score_sets

RNG = np.random.default_rng(0)
LABELS_N = RNG.integers(0, 8, 200)
PROBABILITIES_NK = RNG.dirichlet(np.ones(8), 200).astype(np.float32)


def test_accuracies_and_loss_equal_scikit_learns():
    scores = score(PROBABILITIES_NK, LABELS_N)
    options = {"labels": np.arange(8), "normalize": False}
    assert scores.top1_correct == metrics.top_k_accuracy_score(LABELS_N, PROBABILITIES_NK, k=1, **options)
    assert scores.top5_correct == metrics.top_k_accuracy_score(LABELS_N, PROBABILITIES_NK, k=5, **options)
    exact_NK = PROBABILITIES_NK.astype(np.float64)
    assert scores.loss == pytest.approx(-np.log(exact_NK[np.arange(200), LABELS_N]).mean(), rel=1e-6)
    best_N = PROBABILITIES_NK.argmax(axis=1)
    assert np.array_equal(confusion(best_N, LABELS_N, 8), metrics.confusion_matrix(LABELS_N, best_N))


def test_top5_with_three_classes_counts_all_images():
    scores = score(PROBABILITIES_NK[:, :3], LABELS_N % 3)
    assert (scores.top5_k, scores.top5_correct) == (3, 200)


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_images():
    confidence_N = np.array([0.9, 0.92, 0.5, 0.52], np.float32)  # two bins: (13/15, 14/15] and (7/15, 8/15]
    correct_N = np.array([True, False, True, True])
    expected = 0.5 * abs(0.5 - 0.91) + 0.5 * abs(1 - 0.51)
    assert calibration_error(confidence_N, correct_N) == pytest.approx(expected, rel=1e-5)
    assert calibration_error(np.ones(3, np.float32), np.ones(3, bool)) == 0


def test_label_sets_count_only_images_with_labels():
    best_N = PROBABILITIES_NK.argmax(axis=1)
    accepted = [{int(best), 7} if i % 2 else set() for i, best in enumerate(best_N)]
    accepted[1] = {(int(best_N[1]) + 1) % 8}
    assert score_sets(PROBABILITIES_NK, accepted) == (99, 100)


@pytest.fixture
def images(tmp_path: Path) -> DatasetIndex:
    """Four images in the classes cat and dog, in the root itself."""
    for i, name in enumerate(("dog", "cat", "dog", "cat")):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "set" / name / f"val_{i}.jpg")
    return open_split(tmp_path / "set", "val", tmp_path / "cache")


def test_labels_are_mapped_by_class_name(images):
    assert images.classes == ("cat", "dog")
    assert images.names() == ["val_1", "val_3", "val_0", "val_2"]
    assert map_labels(images, ["ant", "dog", "cat"]).tolist() == [2, 2, 1, 1]
    with pytest.raises(DataError, match=r"1 classes that the model does not know: cat. It knows 2: ant, dog"):
        map_labels(images, ["ant", "dog"])


def test_class_names_match_across_unicode_normalization_forms(tmp_path):
    """Models trained before names were normalized have macOS's form D."""
    (tmp_path / "set" / "\u00e9clair").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "set" / "\u00e9clair" / "a.jpg")
    index = open_split(tmp_path / "set", "val", tmp_path / "cache")
    assert map_labels(index, ["bar", "e\u0301clair"]).tolist() == [1]


def test_numeric_class_names_are_class_ids(tmp_path):
    for name in ("0", "2", "10"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "set" / name / "a.jpg")
    index = open_split(tmp_path / "set", "val", tmp_path / "cache")
    assert map_labels(index, [f"n{i}" for i in range(11)]).tolist() == [0, 10, 2]
    with pytest.raises(DataError, match="does not know"):
        map_labels(index, ["n0", "n1"])


def test_label_files_by_order_and_by_name(images, tmp_path):
    file = tmp_path / "real.json"
    file.write_text("[[0], [], [1, 2], 2]")
    assert read_label_sets(file, images, 3) == [set(), {2}, {0}, {1, 2}]
    file.write_text(json.dumps({f"val/val_{i}.JPEG": i % 3 for i in range(4)}))
    assert read_label_sets(file, images, 3) == [{1}, {0}, {0}, {2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], [1]]", "has 2 entries, but there are 4 images"),
        ("3", "has a int, but there are 4 images"),
        ("[0, 1, 2, 3]", "val_3 has 3; classes must be integers from 0 to 2"),
        ('{"val_0": 1}', "has no entry for 3 images: val_1, val_3, val_2"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_mismatched_label_files_are_reported(images, tmp_path, content, message):
    (tmp_path / "wrong.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_label_sets(tmp_path / "wrong.json", images, 3)


def test_images_with_nan_outputs_are_incorrect_counted_and_without_class():
    probabilities_NK, non_finite = PROBABILITIES_NK.copy(), np.arange(0, 200, 4)
    probabilities_NK[non_finite] = np.nan
    rest = np.setdiff1d(np.arange(200), non_finite)
    scores, of_rest = score(probabilities_NK, LABELS_N), score(PROBABILITIES_NK[rest], LABELS_N[rest])
    assert scores == dataclasses.replace(of_rest, total=200, non_finite=50)
    best_N = best_class(probabilities_NK)
    assert (best_N[non_finite] == NO_CLASS).all()
    assert np.array_equal(confusion(best_N, LABELS_N, 8), confusion(best_N[rest], LABELS_N[rest], 8))
    assert score_sets(probabilities_NK, [set(range(8))] * 200) == (150, 200)
    none = score(probabilities_NK[non_finite], LABELS_N[non_finite])
    assert (none.top1_correct, none.top5_correct, none.loss, none.calibration_error) == (0, 0, None, None)
