"""`densenet data stats`: statistics of a data set as numbers and a plot."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config_data import MAX_PIXELS
from pipeline.data.files import Files
from pipeline.data.images import NotAnImage, decode, ignore_pil_warnings, to_rgb
from pipeline.data.order import permutation
from pipeline.data.tools.image_checks import Chunk, iter_chunks
from pipeline.data.tools.layouts import detect_layout
from pipeline.data.tools.pool import Pool
from pipeline.errors import DataError
from pipeline.files import atomic_file


@dataclass(frozen=True)
class SplitStats:
    """A split: images per class (by label), and widths, heights (pixels) and lengths (bytes) of the decoded sample.

    `mean` and `std` are per RGB channel, of pixel values in [0, 1] of whole images; each image has the same weight.
    """

    samples: int
    bytes: int
    per_class: list[int]
    decoded: int
    unreadable: int
    mean: list[float]
    std: list[float]
    widths: list[int]
    heights: list[int]
    lengths: list[int]


@dataclass(frozen=True)
class Stats:
    """Statistics of the splits of a data set or source, and notes on ignored files and doubtful classes."""

    root: str
    layout: str
    classes: tuple[str, ...]
    splits: dict[str, SplitStats]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns the statistics as a JSON object, with percentiles instead of each image's size."""
        tree = asdict(self)
        for split in tree["splits"].values():
            for name in ("widths", "heights", "lengths"):
                values = np.array(split.pop(name))
                split[name] = {f"p{q}": float(np.percentile(values, q)) for q in (0, 5, 25, 50, 75, 95, 100)}
        return tree


def stats(root: Path, samples: int, pool: Pool, layout: str | None = None, max_pixels: int = MAX_PIXELS) -> Stats:
    """Counts all images, and decodes `samples` images of each split (0: all), chosen uniformly at random.

    Raises:
        DataError: the layout is unknown, or no image can be decoded.
    """
    root = root.absolute()
    source_layout = detect_layout(root, layout)
    scan = source_layout.scan(root, None, pool)
    splits = {}
    for split, table in scan.splits.items():
        chosen = np.sort(permutation(0, 0, len(table))(np.arange(len(table))[: samples or None]))
        tasks = list(iter_chunks(scan.root, split, table.take(chosen), decode=True, max_pixels=max_pixels))
        parts = pool.map(_measure, tasks, f"decoding {split}", [len(task.rows) for task in tasks])
        sizes = np.concatenate([part[0] for part in parts])
        moments = np.concatenate([part[1] for part in parts])
        if not len(sizes):
            raise DataError(
                f"none of the {len(chosen)} images of {split} can be decoded: `densenet data verify` names the reasons."
            )
        mean = moments.mean(axis=0)
        splits[split] = SplitStats(
            samples=len(table),
            bytes=pc.sum(table["length"]).as_py(),
            per_class=np.bincount(table["label"].to_numpy(), minlength=len(scan.classes)).tolist(),
            decoded=len(sizes),
            unreadable=len(chosen) - len(sizes) + len(scan.problems.get(split, {})),
            mean=mean[:3].tolist(),
            std=np.sqrt(mean[3:] - mean[:3] ** 2).tolist(),
            widths=sizes[:, 0].tolist(),
            heights=sizes[:, 1].tolist(),
            lengths=sizes[:, 2].tolist(),
        )
    return Stats(str(root), source_layout.name, scan.classes, splits, scan.notes())


def _measure(chunk: Chunk) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns sizes [n, 3] (width, height, bytes) and channel means of x and x^2 [n, 6] of the n images that decode."""
    files = Files()
    sizes, moments = [], []
    table = chunk.rows.table()
    columns = (table[name].to_pylist() for name in ("path", "offset", "length"))
    with ignore_pil_warnings():
        for path, offset, length in zip(*columns, strict=True):
            try:
                image = to_rgb(decode(files.open(chunk.root / path).read(offset, length), chunk.max_pixels))
            except (NotAnImage, OSError):
                continue
            x = np.asarray(image.convert("RGB"), np.float64).reshape(-1, 3) / 255
            sizes.append((image.width, image.height, length))
            moments.append(np.concatenate([x.mean(axis=0), (x * x).mean(axis=0)]))
    return np.array(sizes, np.int64).reshape(-1, 3), np.array(moments).reshape(-1, 6)


def plot(result: Stats, file: Path) -> None:
    """Plots class balance, image sizes, encoded bytes and channel statistics of each split into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    balance, sides, lengths, channels = figure.subplots(2, 2).ravel()
    for i, (name, split) in enumerate(result.splits.items()):
        per_class = np.sort(split.per_class)[::-1]
        balance.step(np.arange(len(per_class)), per_class, where="mid", label=f"{name}: {split.samples:,} images")
        shorter = np.minimum(split.widths, split.heights)
        _histogram(sides, shorter, f"{name}: {split.decoded:,} decoded")
        _histogram(lengths, np.array(split.lengths) / 1000, name)
        channels.bar(np.arange(3) + 0.3 * i, split.mean, 0.28, yerr=split.std, capsize=3, label=name)
    balance.set(title="images per class", xlabel="classes, largest first", ylim=(0, None))
    sides.set(title="shorter side", xlabel="pixels", ylabel="fraction of images", xscale="log")
    lengths.set(title="encoded length", xlabel="KB", ylabel="fraction of images", xscale="log")
    channels.set(title="channels: mean and standard deviation", ylim=(0, 1))
    channels.set_xticks(np.arange(3) + 0.15, ["red", "green", "blue"])
    for axes in (balance, sides, lengths, channels):
        axes.legend(fontsize="small")
    figure.suptitle(f"{result.root} ({result.layout}, {len(result.classes):,} classes)")
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _histogram(axes: Any, values: NDArray[Any], label: str) -> None:
    bins = np.geomspace(values.min() * 0.99, values.max() * 1.01, 50)
    axes.hist(values, bins=bins, weights=np.full(len(values), 1 / len(values)), alpha=0.6, label=label)
