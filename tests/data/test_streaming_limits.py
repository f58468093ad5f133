"""The limit of the disk space: its texts, and the arithmetic that refuses a limit that is too small."""

import re
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.config_data import Data
from pipeline.data.index import DatasetIndex, Shard
from pipeline.data.streaming.limits import check_limit, shard_bytes
from pipeline.data.tables import table_of
from pipeline.errors import DataError
from pipeline.formatting import format_bytes, parse_bytes

GB = 10**9


def index(sizes_gb: list[int]) -> DatasetIndex:
    """An index of shards of these sizes, with one sample each."""
    names = [f"train/train-{i:06d}.tar" for i in range(len(sizes_gb))]
    count = len(names)
    ones = dict.fromkeys(("label", "length", "width", "height"), [1] * count)
    shards = {name: Shard(size * GB, "") for name, size in zip(names, sizes_gb, strict=True)}
    return DatasetIndex.of_table(Path("/set"), ("a", "b"), table_of({"path": names, "name": names} | ones), shards)


def data(**values: object) -> Data:
    return Data.model_validate({"root": "/set", "stage": "/fast", "window": 2} | values)


@pytest.mark.parametrize(
    ("text", "count"), [("200GB", 200 * GB), ("1.5TB", 1500 * GB), ("4 KB", 4000), ("7", 7), ("7B", 7), (12, 12)]
)
def test_sizes_are_numbers_of_bytes_or_text_in_decimal_units(text, count):
    assert parse_bytes(str(text)) == count
    assert data(stage_limit=text).stage_limit == text, "saved as given"
    assert data(stage_limit=text).stage_limit_bytes == count


@pytest.mark.parametrize("text", ["200GiB", "many", "-5GB", "1e9", "", "GB"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=f"{re.escape(text)} is not a number of bytes: use for example 200GB"):
        data(stage_limit=text)
    with pytest.raises(ValueError, match="must be at least 1 byte"):
        data(stage_limit="0GB")


def test_formatted_sizes_are_sizes():
    for count in (1000, 138_200_000_000, 4_000_000, 2_500_000_000_000):
        assert parse_bytes(format_bytes(count)) == count


def test_a_limit_needs_a_folder():
    with pytest.raises(ValueError, match="stage_limit=5GB limits the disk space of staged shards: set stage"):
        RunConfig.model_validate({"data": {"stage_limit": "5GB"}})


def test_the_full_shuffle_needs_all_data_on_disk():
    train = index([10] * 9)
    check_limit(data(stage_limit="100GB"), train, 10 * GB)
    with pytest.raises(
        DataError,
        match=r"data.stage_limit=40GB \(40.0 GB\) is less than 90.0 GB for training and 10.0 GB for evaluation. .* "
        r"so 67% of the samples would be read over the network one by one: use data.shuffle=windowed",
    ):
        check_limit(data(stage_limit="40GB"), train, 10 * GB)


def test_the_windowed_shuffle_needs_two_windows_on_disk():
    train, val = index([10, 20, 30, 10, 10, 10, 10]), 10 * GB
    check_limit(data(stage_limit="80GB", shuffle="windowed"), train, val)
    with pytest.raises(
        DataError,
        match=r"two windows of data.window=2 shards need 70.0 GB on disk, .* Set data.stage_limit to 80000MB or "
        r"more, or data.window=1 or less",
    ):
        check_limit(data(stage_limit="79GB", shuffle="windowed"), train, val)
    check_limit(data(stage_limit="79GB", shuffle="windowed", window=1), train, val)
    check_limit(data(stage_limit="80000MB", shuffle="windowed"), train, val)
    with pytest.raises(DataError, match=r"80000MB or more, or smaller shards \(densenet data prepare\)"):
        check_limit(data(stage_limit="40GB", shuffle="windowed"), train, val)
    everything = f"{shard_bytes(train) + val}"
    check_limit(data(stage_limit=everything, shuffle="windowed", window=16), train, val)


def test_class_folders_have_no_shards_to_limit():
    table = table_of({"path": ["a/b.jpg"], "label": [0], "length": [1], "width": [1], "height": [1]})
    with pytest.raises(DataError, match="data.root=/set has class folders: prepare shards or unset data.stage"):
        check_limit(data(stage_limit="5GB"), DatasetIndex.of_table(Path("/set"), ("a",), table), 0)
