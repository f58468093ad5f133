"""`densenet data`: prepare, extend, verify, index, compare and describe data sets."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from launch.cli.common.output import console
from pipeline.errors import UserError
from pipeline.limits import MAX_PIXELS

app = typer.Typer(
    name="data",
    help="Prepare, extend, verify, index, compare and describe data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Root = Annotated[
    Path, typer.Argument(help="folder of a data set, or of a source in a supported layout", show_default=False)
]
Workers = Annotated[int, typer.Option(min=1, help="number of processes", show_default="one per CPU core")]
Layout = Annotated[
    str | None,
    typer.Option(
        help="prepared, ilsvrc, kaggle, parquet, webdataset, wordnet-tars, folders or list; detected by default"
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="file for the complete report")]
MaxPixels = Annotated[
    int, typer.Option(min=1, help="maximum pixels per image", show_default="178,956,970, PIL's limit")
]
Classes = Annotated[
    Path | None, typer.Option("--classes", help="list of the classes to use: a name per line, optionally a new name")
]
MinImages = Annotated[
    int, typer.Option(min=0, help="drop classes with fewer training images, before the validation split")
]
ValPerClass = Annotated[
    int, typer.Option(min=0, help="images of each class for the validation split, of a source without one")
]
License = Annotated[
    str | None, typer.Option("--license", help="license of the images, recorded in the data set and with models")
]
Citation = Annotated[
    str | None, typer.Option("--source", help="source of the images, a citation or address, recorded in the data set")
]
CORES = len(os.sched_getaffinity(0))


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="folder with the archives, shards or class folders")],
    target: Annotated[Path, typer.Argument(help="folder of the data set: new, empty, or of an unfinished preparation")],
    to: Annotated[str, typer.Option(help="output format: shards or folders")] = "shards",
    shorter_side: Annotated[
        int | None, typer.Option(min=16, help="resize: re-encode with at most this shorter side in pixels")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="quality of encoded JPEGs; 90 with --shorter-side, else 95")
    ] = None,
    shard_size: Annotated[float, typer.Option(min=0.01, help="MB of images per shard")] = 128,
    seed: Annotated[
        int, typer.Option(min=0, help="random seed of the order in the shards and of the validation split")
    ] = 0,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="skip corrupt images")] = False,
    share: Annotated[
        str, typer.Option(help="K/N: write part K (from 0) of N, to prepare on N machines that share both folders")
    ] = "0/1",
    classes: Classes = None,
    min_images: MinImages = 0,
    val_per_class: ValPerClass = 0,
    license_: License = None,
    citation: Citation = None,
    workers: Workers = CORES,
    layout: Layout = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Prepare a data set from archives, shards or class folders.

    Repeat the command to resume an interrupted preparation.

    Example: densenet data prepare /downloads /data/imagenet
    """
    from launch.cli.common.data_report import print_prepared, process_pool
    from pipeline.data.tools.data_card import Origin
    from pipeline.data.tools.prepare import PrepareOptions, prepare
    from pipeline.data.tools.selection import Selection

    if to not in ("shards", "folders"):
        raise UserError(f"--to={to} is unknown: use shards or folders.")
    options = PrepareOptions(
        to=to,  # type: ignore[arg-type]
        seed=seed,
        shard_bytes=round(shard_size * 1e6),
        shorter_side=shorter_side,
        quality=quality or (95 if shorter_side is None else 90),
    )
    index, _, shares = share.partition("/")
    if not (index.isdecimal() and shares.isdecimal() and int(index) < int(shares)):
        raise UserError(f"--share={share} is invalid: use K/N with K from 0 to N - 1, such as 0/8.")
    share_of_total = int(index), int(shares)
    selection = Selection(classes, min_images, val_per_class, seed)
    origin = Origin(license_, citation)
    started = time.perf_counter()
    with process_pool(console, workers) as pool:
        result = prepare(
            source, target, options, pool, layout, skip_corrupt, share_of_total, max_pixels, selection, origin
        )
    print_prepared(console, target, share_of_total, result, time.perf_counter() - started)


@app.command()
def append(
    source: Annotated[Path, typer.Argument(help="folder with the new archives, shards or class folders")],
    target: Annotated[Path, typer.Argument(help="folder of a prepared data set in shards")],
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="skip images whose class and name the data set has already")
    ] = False,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="skip corrupt images")] = False,
    citation: Citation = None,
    workers: Workers = CORES,
    layout: Layout = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Add images of known classes to a prepared data set, as new shards.

    Repeat the command to resume after an interruption.

    Example: densenet data append /downloads/more /data/imagenet
    """
    from launch.cli.common.data_report import print_appended, process_pool
    from pipeline.data.tools.append import append
    from pipeline.data.tools.data_card import Origin

    with process_pool(console, workers) as pool:
        result = append(source, target, pool, layout, skip_existing, skip_corrupt, max_pixels, Origin(source=citation))
    print_appended(console, target, result)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="folder of a prepared or indexed data set")],
    second: Annotated[Path, typer.Argument(help="folder of another one")],
    by: Annotated[str, typer.Option(help="identify images by file name, or by content (checksum and length)")] = "name",
    json_file: Json = None,
) -> None:
    """Compare two data sets image by image; exit code 1 if they differ.

    Reads the indexes only.

    Example: densenet data diff /data/old /data/new
    """
    from launch.cli.common.data_report import print_difference, write_json
    from pipeline.data.tools.diff import diff

    if by not in ("name", "content"):
        raise UserError(f"--by={by} is unknown: use name or content.")
    result = diff(first, second, by)  # type: ignore[arg-type]
    if json_file is not None:
        write_json(json_file, result.to_json())
    print_difference(console, result)
    raise typer.Exit(0 if result.is_equal else 1)


@app.command()
def index(
    source: Annotated[
        str,
        typer.Argument(help="folder of a source in a supported layout; with --to also a URI", show_default=False),
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="new folder for the index of WebDataset shards or Parquet files that stay at SOURCE"),
    ] = None,
    classes: Classes = None,
    min_images: MinImages = 0,
    val_per_class: ValPerClass = 0,
    seed: Annotated[int, typer.Option(min=0, help="random seed of the validation split")] = 0,
    workers: Workers = CORES,
    layout: Layout = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Index class folders, shards or archives in place.

    Writes the index with sizes and checksums into the folder and copies nothing. With --to, reads WebDataset shards or
    Parquet files at a URI, each once; training fetches them from there. Repeat the command to resume it.

    Example: densenet data index s3://bucket/shards --to /data/index
    """
    from launch.cli.common.data_report import print_indexed, process_pool
    from pipeline.data.tools.index_at_address import index_at_address
    from pipeline.data.tools.index_in_place import index_in_place
    from pipeline.data.tools.selection import Selection

    if to is None and "://" in source:
        raise UserError(f"{source} is a URI: pass --to FOLDER, a new folder for the index.")
    selection = Selection(classes, min_images, val_per_class, seed)
    root = to or Path(source)
    with process_pool(console, workers) as pool:
        if to is not None:
            manifest, notes = index_at_address(source, to, pool, layout, max_pixels, selection)
        else:
            manifest, notes = index_in_place(root, pool, layout, max_pixels, selection)
    print_indexed(console, root, manifest, notes)


@app.command()
def verify(
    root: Root,
    json_file: Json = None,
    any_counts: Annotated[
        bool, typer.Option("--any-counts", help="allow other numbers of images than ImageNet's for its classes")
    ] = False,
    workers: Workers = CORES,
    layout: Layout = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Read and decode all images; exit code 1 if there are errors.

    Example: densenet data verify /data/imagenet
    """
    from launch.cli.common.data_report import print_verified, process_pool, write_json
    from pipeline.data.tools import verify

    with process_pool(console, workers) as pool:
        report = verify.verify(root, pool, layout, any_counts, max_pixels)
    if json_file is not None:
        write_json(json_file, report.to_json())
    print_verified(console, report)
    raise typer.Exit(1 if report.errors else 0)


@app.command()
def stats(
    root: Root,
    samples: Annotated[int, typer.Option(min=0, help="images to decode per split; 0: all")] = 5000,
    plot: Annotated[Path, typer.Option(help="PNG file for the plot")] = Path("stats.png"),
    json_file: Json = None,
    workers: Workers = CORES,
    layout: Layout = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Count classes, and measure image sizes and channels.

    Example: densenet data stats /data/imagenet --plot stats.png
    """
    from launch.cli.common.data_report import print_stats, process_pool, write_json
    from pipeline.data.tools import stats

    with process_pool(console, workers) as pool:
        result = stats.stats(root, samples, pool, layout, max_pixels)
    print_stats(console, result)
    try:
        stats.plot(result, plot)
    except OSError as error:
        raise UserError(f"--plot={plot} cannot be written: {error.strerror or error}.") from error
    if json_file is not None:
        write_json(json_file, result.to_json())
    console.print(f"plot: {plot}", soft_wrap=True)
