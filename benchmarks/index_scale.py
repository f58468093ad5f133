"""Time and memory to open large indexes, and to plan batches of a run resumed in epoch 57, by 1 and 8 ranks of a node.

    python -m benchmarks.index_scale [--sizes 1281167 14197122 100000000]

The indexes have synthetic samples in shards (empty files without disk usage): as many as ImageNet-1k, ImageNet-21k and
a web set. Each rank is a new process. Memory is the proportional set size: pages that ranks share count once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.common import machine, save_result
from pipeline.data.columns import Columns
from pipeline.data.dataset import Manifest, Split, index_file
from pipeline.data.index import Shard
from pipeline.data.index_file import names_file, save_index

SIZES = (1_281_167, 14_197_122, 100_000_000)
VAL, SAMPLES_PER_SHARD, CLASSES = 50_000, 1165, 1000
EPOCH, BATCH, BATCHES = 57, 256, 40

MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np, psutil
from pipeline.data.dataset import open_splits
from pipeline.data.batches import train_plan
from pipeline.config import RunConfig
root, position, batch, batches = sys.argv[1], *map(int, sys.argv[2:5])
process = psutil.Process()
memory = process.memory_full_info().pss
started = time.perf_counter()
index, _ = open_splits(root, "train", "val", Path(root))
opened = time.perf_counter()
index.fingerprint
known = time.perf_counter()
plan = train_plan(RunConfig(), index)
planned = plan.batch(np.arange(position, position + batch), 224)
index.labels_N[planned.ids_B], index.path(int(planned.ids_B[0]))
ready = time.perf_counter()
for i in range(1, batches + 1):
    planned = plan.batch(np.arange(position + i * batch, position + (i + 1) * batch), 224)
    index.labels_N[planned.ids_B]
done = time.perf_counter()
print(json.dumps({"open": opened - started, "fingerprint": known - opened, "ready": ready - started,
                  "rate": batches * batch / (done - ready)}))
sys.stdout.flush()
sys.stdin.readline()  # until all ranks are here
print(process.memory_full_info().pss - memory)
"""


def main() -> None:
    """Writes and measures each index."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    for samples in parser.parse_args().sizes:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_set(root, samples)
            file = index_file(root, "train")
            print(f"\nindex of {samples:,} samples in {-(-samples // SAMPLES_PER_SHARD):,} shards: {machine()}")
            _save(samples, "bytes per sample", file.stat().st_size / samples, "bytes")
            _save(samples, "bytes per sample, names", names_file(file).stat().st_size / samples, "bytes")
            runs = [measure(root, EPOCH * samples + samples // 2) for _ in range(3)]
            for key, label, unit in (
                ("open", "open, check shards", "s"),
                ("fingerprint", "fingerprint", "s"),
                ("ready", f"and plan the first batch of epoch {EPOCH}", "s"),
                ("rate", "planning rate of one rank", "samples/s"),
            ):
                _save(samples, label, float(np.median([run[key] for run in runs])), unit, len(runs))
            _save(samples, "memory of 1 rank", float(np.median([run["memory"] for run in runs])) / 1e6, "MB", len(runs))
            _save(samples, "memory of 8 ranks", measure(root, EPOCH * samples, ranks=8)["memory"] / 1e6, "MB")


def _save(samples: int, label: str, value: float, unit: str, rounds: int = 1) -> None:
    print(f"  {label:44} {value:14,.3f} {unit}", flush=True)
    save_result(f"index of {samples:,} samples", label, value, unit, rounds=rounds)


def measure(root: Path, position: int, ranks: int = 1) -> dict[str, float]:
    """Opens the index in `ranks` new processes and plans batches at `position`.

    Returns seconds and samples per second of the first process, and the bytes of memory of all.
    """
    arguments = [sys.executable, "-c", MEASURE, str(root), str(position), str(BATCH), str(BATCHES)]
    processes = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(ranks)
    ]
    results = []
    for process in processes:
        assert process.stdout is not None
        results.append(json.loads(process.stdout.readline()))
    memory = 0
    for process in processes:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        memory += int(process.stdout.readline())
    for process in processes:
        process.communicate()
    return results[0] | {"memory": memory}


def write_set(root: Path, samples: int) -> None:
    """Writes the manifest and indexes of a data set without images."""
    classes = tuple(f"n{i:08d}" for i in range(CLASSES))
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", samples), ("val", VAL)):
        starts = np.arange(0, count, SAMPLES_PER_SHARD)
        shards = {f"{split}/{split}-{i:06d}.tar": Shard(0, "0" * 64) for i in range(len(starts))}
        lengths_N = rng.integers(20_000, 200_000, count, np.uint32)
        labels_N = rng.integers(0, CLASSES, count, np.int32)
        columns = Columns(
            files=tuple(shards),
            first_rows_S1=np.append(starts, count).astype(np.int64),
            offsets_N=np.cumsum(lengths_N, dtype=np.int64) % 2**27,
            lengths_N=lengths_N,
            labels_N=labels_N,
            widths_N=rng.integers(200, 800, count, np.int32),
            heights_N=rng.integers(200, 800, count, np.int32),
            crc32_N=rng.integers(0, 2**32, count, np.uint32),
            names=_names(classes, labels_N),
        )
        file = index_file(root, split)
        file.parent.mkdir(exist_ok=True)
        summary = save_index(columns, classes, file)
        (root / split).mkdir()
        for name in shards:
            (root / name).touch()
        splits[split] = Split(count, summary.bytes, file.relative_to(root).as_posix(), shards)
    Manifest("shards", classes, splits, {}).save(root)


def _names(classes: tuple[str, ...], labels_N: np.ndarray) -> pa.Array:
    """Returns names such as `n00000007/n00000007_123.JPEG`."""
    texts = pa.array(classes, pa.large_string())
    parts = []
    for start in range(0, len(labels_N), 1 << 20):
        wnids = texts.take(pa.array(labels_N[start : start + (1 << 20)]))
        numbers = pc.cast(pa.array(np.arange(start, start + len(wnids))), pa.large_string())
        ends = [pa.scalar(text, pa.large_string()) for text in ("/", "_", ".JPEG", "")]
        parts.append(pc.binary_join_element_wise(wnids, ends[0], wnids, ends[1], numbers, ends[2], ends[3]))
    return pa.concat_arrays(parts)


if __name__ == "__main__":
    main()
