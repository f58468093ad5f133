"""`densenet predict`: the classes of images."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from launch.progress import speed
from launch.sources import model_folder
from pipeline.errors import UserError
from pipeline.export.predict import predict_files, predict_folder


def predict_command(
    console: Console,
    model: str,
    images: list[Path],
    top: int,
    batch: Path | None,
    out: Path | None,
    batch_size: int,
    uri: str | None,
) -> None:
    """Prints each image's most probable classes with their probabilities, or writes those of a whole folder.

    Raises:
        UserError: there is no such model, or a file is missing or is not an image.
    """
    if (batch is None) != (out is None) or bool(images) == (batch is not None):
        raise UserError("give image files, or a folder with --batch DIR --out FILE.parquet.")
    folder = model_folder(model, uri)
    if batch is None or out is None:
        for prediction in predict_files(folder, images, top):
            console.print(str(prediction.path), markup=False, soft_wrap=True)
            for name, probability in prediction.classes:
                console.print(f"  {probability:8.2%}  {name}", markup=False, soft_wrap=True)
        return
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("classifying", total=None)
        found = predict_folder(
            folder,
            batch,
            out,
            top=top,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    damaged = f", {found.damaged} files are no sound pictures (column `error`)" if found.damaged else ""
    console.print(f"{found.classified:,} pictures in {out}, {speed(found.img_per_s)}{damaged}", soft_wrap=True)
