"""`densenet data`: make, check, index and describe data sets."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from launch.cli.common.output import console
from pipeline.config import MAX_PIXELS
from pipeline.errors import UserError

app = typer.Typer(
    name="data", help="Make, check, index and describe data sets.", no_args_is_help=True, rich_markup_mode=None
)

Root = Annotated[Path, typer.Argument(help="a data set's folder, or a source of any known layout", show_default=False)]
Workers = Annotated[int, typer.Option(min=1, help="processes", show_default="one per CPU core")]
Layout = Annotated[
    str | None,
    typer.Option(help="prepared, ilsvrc, kaggle, parquet, webdataset, folders or list; told by looking if not given"),
]
Json = Annotated[Path | None, typer.Option("--json", help="file for the whole report")]
MaxPixels = Annotated[
    int, typer.Option(min=1, help="images of more pixels are refused", show_default="178,956,970, PIL's limit")
]
CORES = len(os.sched_getaffinity(0))


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="folder with the archives, shards or class folders")],
    target: Annotated[Path, typer.Argument(help="the data set's folder: new, empty, or begun before")],
    to: Annotated[str, typer.Option(help="shards or folders")] = "shards",
    shorter_side: Annotated[
        int | None, typer.Option(min=16, help="re-encode: the shorter side is at most so many pixels")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="of JPEGs that are encoded; 90 with --shorter-side, else 95")
    ] = None,
    shard_size: Annotated[float, typer.Option(min=0.01, help="MB of images in a shard")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="of the order in the shards")] = 0,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="leave corrupt images out")] = False,
    share: Annotated[
        str, typer.Option(help="K/N: of N such commands on machines that see both folders, this is number K (from 0)")
    ] = "0/1",
    workers: Workers = CORES,
    layout: Layout = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Make a data set from archives, shards, Parquet files or class folders.

    An interrupted preparation goes on when the command is repeated.

    Example: densenet data prepare /downloads /data/imagenet
    """
    from launch.cli.common.data_report import pool, print_prepared
    from pipeline.data.tools.prepare import PrepareOptions, prepare

    if to not in ("shards", "folders"):
        raise UserError(f"--to={to} is not known: use shards or folders.")
    options = PrepareOptions(
        to=to,  # type: ignore[arg-type]
        seed=seed,
        shard_bytes=round(shard_size * 1e6),
        shorter_side=shorter_side,
        quality=quality or (95 if shorter_side is None else 90),
    )
    index, _, shares = share.partition("/")
    if not (index.isdecimal() and shares.isdecimal() and int(index) < int(shares)):
        raise UserError(f"--share={share} is not known: use K/N with K from 0 to N - 1, as 0/8.")
    of = int(index), int(shares)
    started = time.perf_counter()
    with pool(console, workers) as processes:
        done = prepare(source, target, options, processes, layout, skip_corrupt, of, max_pixels)
    print_prepared(console, target, of, done, time.perf_counter() - started)


@app.command()
def index(root: Root, workers: Workers = CORES, layout: Layout = None, max_pixels: MaxPixels = MAX_PIXELS) -> None:
    """Index data where it lies, with checksums.

    Class folders, shards or archives.

    Example: densenet data index /data/folders
    """
    from launch.cli.common.data_report import pool, print_indexed
    from pipeline.data.tools.in_place import index_in_place

    with pool(console, workers) as processes:
        manifest, notes = index_in_place(root, processes, layout, max_pixels)
    print_indexed(console, root, manifest, notes)


@app.command()
def verify(
    root: Root,
    json_file: Json = None,
    any_counts: Annotated[
        bool, typer.Option("--any-counts", help="1,000 WordNet ids need not have ImageNet's numbers of images")
    ] = False,
    workers: Workers = CORES,
    layout: Layout = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Read and decode everything; exit code 1 where there is corruption.

    Example: densenet data verify /data/imagenet
    """
    from launch.cli.common.data_report import pool, print_verified, write_json
    from pipeline.data.tools import verify

    with pool(console, workers) as processes:
        found = verify.verify(root, processes, layout, any_counts, max_pixels)
    if json_file is not None:
        write_json(json_file, found.to_json())
    print_verified(console, found)
    raise typer.Exit(1 if found.corruption else 0)


@app.command()
def stats(
    root: Root,
    samples: Annotated[int, typer.Option(min=0, help="images decoded of each split; 0: all")] = 5000,
    plot: Annotated[Path, typer.Option(help="PNG file")] = Path("stats.png"),
    json_file: Json = None,
    workers: Workers = CORES,
    layout: Layout = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Count classes, and measure sizes, bytes and channels.

    Example: densenet data stats /data/imagenet --plot stats.png
    """
    from launch.cli.common.data_report import pool, print_stats, write_json
    from pipeline.data.tools import stats

    with pool(console, workers) as processes:
        found = stats.stats(root, samples, processes, layout, max_pixels)
    print_stats(console, found)
    try:
        stats.plot(found, plot)
    except OSError as error:
        raise UserError(f"--plot={plot} cannot be written: {error.strerror or error}.") from error
    if json_file is not None:
        write_json(json_file, found.to_json())
    console.print(f"plot: {plot}", soft_wrap=True)
