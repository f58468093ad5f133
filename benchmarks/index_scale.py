"""Time and memory to open an ImageNet-sized index and to plan the first batch of a run resumed in epoch 57.

    python -m benchmarks.index_scale

The index has 1,281,167 synthetic samples in 1,100 shards (empty files without disk usage); each measurement uses a new
process.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.common import machine, save_result
from pipeline.data.dataset import Manifest, Split, index_file
from pipeline.data.index import SCHEMA, Shard, save_table

N, VAL, SHARDS = 1_281_167, 50_000, 1_100
EPOCH, SAMPLE, BATCH = 57, 900_000, 256

MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np, psutil
from pipeline.data.dataset import open_splits
from pipeline.data.plan import TrainPlan
root, position, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
memory = psutil.Process().memory_info().rss
started = time.perf_counter()
index, _ = open_splits(root, "train", "val", Path(root))
opened = time.perf_counter()
plan = TrainPlan(0, index.widths_N, index.heights_N, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
planned = plan.batch(np.arange(position, position + batch), 224)
index.labels_N, index.path(int(planned.ids_B[0]))
ready = time.perf_counter()
used = psutil.Process().memory_info().rss - memory
index.fingerprint
print(json.dumps({"open": opened - started, "ready": ready - started, "memory": used,
                  "fingerprint": time.perf_counter() - ready}))
"""


def main() -> None:
    """Writes the index and measures it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_set(root)
        runs = [measure(root, EPOCH * N + SAMPLE) for _ in range(3)]
        size = index_file(root, "train").stat().st_size
    print(f"\nindex of {N:,} samples: {machine()}, medians of {len(runs)} processes; {size / 1e6:.1f} MB on disk")
    labels = {
        "open": f"open, check {SHARDS:,} shards",
        "ready": f"plan the first batch of epoch {EPOCH} at sample {SAMPLE:,}",
        "fingerprint": "fingerprint",
        "memory": "memory",
    }
    for key, label in labels.items():
        value = float(np.median([run[key] for run in runs]))
        amount, unit = (value / 1e6, "MB") if key == "memory" else (value, "s")
        print(f"  {label:52} {amount:8.3f} {unit}")
        save_result("index of 1,281,167 samples", label, amount, unit, rounds=len(runs))


def measure(root: Path, position: int) -> dict[str, float]:
    """Returns seconds and bytes of a new process that opens the index and plans the batch at `position`."""
    arguments = [sys.executable, "-c", MEASURE, str(root), str(position), str(BATCH)]
    return json.loads(subprocess.run(arguments, check=True, capture_output=True).stdout)


def write_set(root: Path, samples: int = N, train_shards: int = SHARDS) -> None:
    """Writes the manifest and indexes of a data set without images."""
    classes = tuple(f"n{i:08d}" for i in range(1000))
    rng = np.random.default_rng(0)
    splits = {}
    for split, count, shards in (("train", samples, train_shards), ("val", VAL, 40)):
        lengths = rng.integers(20_000, 200_000, count)
        shard = np.sort(np.arange(count) % shards)
        names = [f"{split}/{split}-{i:06d}.tar" for i in range(shards)]
        columns = {
            "path": pa.DictionaryArray.from_arrays(pa.array(shard, pa.int32()), pa.array(names)),
            "name": pa.array([f"{classes[i % 1000]}/{classes[i % 1000]}_{i}.JPEG" for i in range(count)]),
            "offset": pa.array(np.cumsum(lengths) % 2**40),
            "length": pa.array(lengths),
            "label": pa.array(rng.integers(0, 1000, count), pa.int32()),
            "width": pa.array(rng.integers(200, 800, count), pa.int32()),
            "height": pa.array(rng.integers(200, 800, count), pa.int32()),
            "crc32": pa.array(rng.integers(0, 2**32, count), pa.uint32()),
            "mtime_ns": pa.nulls(count, pa.int64()),
        }
        index_file(root, split).parent.mkdir(exist_ok=True)
        save_table(pa.table([columns[field.name] for field in SCHEMA], schema=SCHEMA), index_file(root, split))
        (root / split).mkdir()
        for name in names:
            (root / name).touch()
        splits[split] = Split(count, int(lengths.sum()), {name: Shard(0, "") for name in names})
    Manifest("shards", classes, splits, {}).save(root)


if __name__ == "__main__":
    main()
