"""A complete training run from a bucket, through a cache of a third of the data."""

import csv
import re
from pathlib import Path

import fsspec
import pytest

from pipeline.data.dataset import read_manifest
from pipeline.data.generated import generate_data
from pipeline.data.tools.pool import Pool
from pipeline.data.tools.prepare import PrepareOptions, prepare
from tests.servers import s3_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),  # of the store
]


def losses(run: Path) -> list[tuple[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [(row["samples_seen"], row["value"]) for row in rows if row["metric"] in ("train/loss", "val/loss")]


def test_two_workers_train_from_a_bucket_as_from_a_folder(forked_densenet, tmp_path, monkeypatch):
    """The same losses, with a third of the shards on disk at a time; a limit that is too small is refused."""
    with Pool(1) as pool:
        prepare(Path(generate_data("digits://", tmp_path)), tmp_path / "set", PrepareOptions(shard_bytes=100_000), pool)
    manifest = read_manifest(tmp_path / "set")
    assert manifest is not None
    sizes = {name: [shard.bytes for shard in split.shards.values()] for name, split in manifest.splits.items()}
    limit = sum(sizes["val"]) + sum(sizes["train"]) // 3
    assert limit >= sum(sizes["val"]) + 2 * max(sizes["train"])
    common = ["train", "configs/demo.yaml", "data.shuffle=windowed", "data.window=1", "train.epochs=2"]
    common += ["train.log_every_steps=1", f"run.output={tmp_path / 'out'}"]
    with s3_store(monkeypatch):
        fsspec.filesystem("s3").put(f"{tmp_path / 'set'}/", "bucket/set/", recursive=True)
        stream = ["data.root=s3://bucket/set", f"data.stage={tmp_path / 'fast'}"]
        done = forked_densenet(*common, *stream, f"data.stage_limit={limit}", "run.name=streamed")
        assert done.returncode == 0, done.stdout
        refused = forked_densenet(*common, *stream, "data.stage_limit=10KB", "run.name=refused")
    assert refused.returncode == 2
    assert "data.stage_limit=10KB (10.0 KB) is too small for" in refused.stdout
    done = forked_densenet(*common, f"data.root={tmp_path / 'set'}", "run.name=local")
    assert done.returncode == 0, done.stdout
    local, streamed = (losses(tmp_path / "out" / name) for name in ("local", "streamed"))
    assert len(local) > 45, "a line per step"
    assert streamed == local
    (log,) = (tmp_path / "fast").glob("*-stream/.cache/fetcher.log")
    usages = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes on disk and (\d+) in progress", log.read_text())]
    assert max(usages) <= limit - sum(sizes["val"])
