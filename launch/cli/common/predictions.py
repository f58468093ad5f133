"""Report of `densenet predict`: the predicted classes of images."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pipeline.errors import UserError
from pipeline.export.open import open_model
from pipeline.formatting import speed
from pipeline.tracking.stores import Stores


def predict_command(
    console: Console,
    model: str,
    images: list[Path],
    top: int,
    batch: Path | None,
    out: Path | None,
    batch_size: int,
    stores: Stores,
    as_json: bool,
) -> None:
    """Prints each image's top classes with their probabilities, or writes those of a folder's images to a table.

    Raises:
        UserError: The model does not exist, or a file is missing or is not an image.
    """
    if (batch is None) != (out is None) or bool(images) == (batch is not None):
        raise UserError("give image files, or a folder with --batch DIR --out FILE.parquet.")
    if as_json and batch is not None:
        raise UserError("--json prints the classes of image files, --batch writes a table: omit one.")
    opened = open_model(model, stores=stores)
    if batch is None or out is None:
        predictions = opened.predict(images, top)
        if as_json:
            print(json.dumps([asdict(prediction) for prediction in predictions], indent=2))
            return
        for prediction in predictions:
            console.print(prediction.image, markup=False, soft_wrap=True)
            for name, probability in prediction.classes.items():
                console.print(f"  {probability:8.2%}  {name}", markup=False, soft_wrap=True)
        return
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("classifying", total=None)
        done = opened.predict_folder(
            batch,
            out,
            topk=top,
            batch_size=batch_size,
            progress=lambda completed, total: bar.update(task, completed=completed, total=total),
        )
    problems = f", {done.corrupt} files are not valid images (column `error`)" if done.corrupt else ""
    if done.non_finite:
        problems += f", for {done.non_finite} the model gives NaN or infinities (column `error`)"
    console.print(f"{done.classified:,} images in {done.out}, {speed(done.img_per_s)}{problems}", soft_wrap=True)
    for line in done.ignored:
        console.print(f"ignored: {line}", markup=False, soft_wrap=True)
