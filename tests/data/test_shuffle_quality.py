"""The number of classes per window: measured and expected, for shards that are shuffled or ordered by class."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.index import DatasetIndex
from pipeline.data.shuffle_quality import shuffle_warning, window_classes
from pipeline.data.tables import table_of

SHARDS, PER_SHARD, CLASSES = 40, 50, 100


def index(labels_N: np.ndarray) -> DatasetIndex:
    paths = np.repeat([f"train-{i}.tar" for i in range(SHARDS)], PER_SHARD).tolist()
    ones = np.ones(len(labels_N), np.int32)
    rows = {"path": paths, "name": paths, "label": labels_N, "length": ones, "width": ones, "height": ones}
    return DatasetIndex.of_table(Path("/set"), tuple(map(str, range(CLASSES))), table_of(rows))


LABELS = np.arange(SHARDS * PER_SHARD) // 20  # 20 samples of each class


@pytest.mark.parametrize("window", [1, 4, 16])
def test_shuffled_samples_have_the_expected_number_of_classes(window):
    measured = window_classes(index(np.random.default_rng(0).permutation(LABELS)), window)
    assert measured.found == pytest.approx(measured.expected, rel=0.05)
    assert not measured.is_poor
    assert shuffle_warning(index(np.random.default_rng(0).permutation(LABELS)), window) is None


def test_the_expectation_is_that_of_draws_without_replacement():
    expected = window_classes(index(LABELS), 4).expected
    rng = np.random.default_rng(1)
    drawn = [len(np.unique(rng.choice(LABELS, 4 * PER_SHARD, replace=False))) for _ in range(300)]
    assert expected == pytest.approx(np.mean(drawn), rel=0.01)


def test_shards_ordered_by_class_are_found():
    ordered = index(LABELS)
    measured = window_classes(ordered, 4)
    assert measured.found <= 4 * 4  # a shard has at most four classes
    assert measured.is_poor
    message = shuffle_warning(ordered, 4)
    assert message is not None
    assert message.startswith(
        f"data.shuffle=windowed: windows of 4 shards have {measured.found:.1f} classes on average"
    )
    assert f"would have {measured.expected:.1f} if samples were shuffled" in message


def test_a_window_of_all_shards_is_a_full_shuffle():
    measured = window_classes(index(LABELS), SHARDS)
    assert (measured.found, measured.expected) == (CLASSES, CLASSES)
    assert shuffle_warning(index(LABELS), SHARDS) is None
