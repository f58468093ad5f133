"""A model to predict and evaluate with, opened by whatever name it has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.config import Interpolation
from pipeline.data.dataset import open_split
from pipeline.data.index import DatasetIndex
from pipeline.data.open import resolve_data_root
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import Evaluation, evaluate, override_transform
from pipeline.export.predict import FolderPredictions, ImageInput, Prediction, Predictor, predict_folder
from pipeline.extras import extra
from pipeline.model.card import ModelCard
from pipeline.model.densenet import create
from pipeline.model.timm_files import card_from_weights
from pipeline.model.weights import load_model, load_weights
from pipeline.tracking.stores import Stores, stores_from_options
from pipeline.train.locate import locate

if TYPE_CHECKING:
    from pipeline.export.int8 import OnnxResult


def open_model(
    place: str | Path,
    *,
    classes: Sequence[str] | None = None,
    stores: Stores | None = None,
    cache: str | Path = "outputs",
) -> "TrainedModel":
    """Opens a model; its weights are read when they are first needed.

    Args:
        place: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME; a run's folder, whose best checkpoint is taken;
            a checkpoint's folder; or a .safetensors or .pth file of a DenseNet as timm or torchvision name its weights.
        classes: For such a file: the class names in the order of the logits. By default those in timm's `config.json`
            beside it, or, as timm takes it, ImageNet's where their number fits.
        stores: Where runs and registered models are; by default as `densenet` finds them: by the environment, else in
            the folder `cache`.
        cache: Folder for downloaded models and indexes of class folders: the `run.output` of trainings.

    Raises:
        UserError: there is no such model, or a file's model or classes are not known.
    """
    output = Path(cache).absolute()
    folder = locate(str(place), "MODEL", output / "models", stores or stores_from_options(None, None, output))
    if folder.is_file():
        card = card_from_weights(folder, classes)
        return TrainedModel(str(place), folder, card, output)
    card = ModelCard.read(folder)
    if classes is not None:
        raise UserError(f"classes have no effect: {folder} has a card that tells them. Leave them out.")
    return TrainedModel(str(place), folder, card, output)


FORMATS = ("onnx", "torch", "timm", "int8")


@dataclass(frozen=True)
class Exported:
    """A file, or a folder for timm, that another program takes.

    Its logits equal torch's to `tolerance`; `opset` is ONNX's. For int8, which has other logits, `fp32` and `int8` tell
    hits and speed of the plain and the quantized ONNX file.
    """

    file: str
    tolerance: float | None = None
    opset: int | None = None
    fp32: "OnnxResult | None" = None
    int8: "OnnxResult | None" = None


class TrainedModel:
    """A model from `open_model`: `place` is its name there, `card` tells all that is known of it."""

    def __init__(self, place: str, folder: Path, card: ModelCard, cache: Path) -> None:
        self.place, self.card, self._folder, self._cache = place, card, folder, cache

    def __repr__(self) -> str:
        return f"TrainedModel({self.place}: {self.card.name}, {self.card.num_classes} classes)"

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the logits."""
        return self.card.classes

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return self._folder if self._folder.is_file() else self._folder / self.card.weights

    @cached_property
    def module(self) -> nn.Module:
        """The torch module, in evaluation mode: images [N, C, H, W] after the card's transform to logits [N, K]."""
        if not self._folder.is_file():
            return load_model(self._folder)
        model = create(self.card.model, self.card.num_classes)
        load_weights(model, self._folder)
        return model.eval()

    def predict(self, images: ImageInput | Sequence[ImageInput], topk: int = 5) -> list[Prediction]:
        """The `topk` most probable classes of each image, by the code that is packaged with models, on the CPU.

        Args:
            images: Paths, bytes of image files, or arrays of uint8, [H, W, 3] (RGB), [H, W] (gray) or [H, W, 4]; one or
                several of them.
            topk: How many classes.

        Raises:
            UserError: a file is missing or is not an image, or the model gives NaN or infinities for it.
        """
        one = isinstance(images, str | Path | bytes) or hasattr(images, "dtype")
        given: Any = [images] if one else images
        return self._predictor.predict(given, topk)

    @cached_property
    def _predictor(self) -> Predictor:
        module = self.module.cpu()  # evaluation may have moved it
        return Predictor(self.card, module.state_dict(), str(self._folder))

    def predict_folder(
        self,
        images: str | Path,
        out: str | Path,
        *,
        topk: int = 5,
        batch_size: int = 64,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> FolderPredictions:
        """Classifies all files below a folder, on the GPU where there is one, into the Parquet file `out`.

        It has a row for each file: `image`, its path below the folder; `class_id`, `class_name` and `probability` of
        the best class; `top_class_ids` and `top_probabilities`; or what is wrong with it in `error`. `progress` is told
        how many of how many are done.

        Raises:
            UserError: there are no files, or `out` cannot be written.
        """
        return predict_folder(
            self.module, self.card, Path(images), Path(out), topk=topk, batch_size=batch_size, progress=progress
        )

    def evaluate(
        self,
        data: str | Path,
        split: str = "val",
        *,
        crop: int | None = None,
        resize: int | None = None,
        interpolation: Interpolation | None = None,
        tta: str | None = None,
        labels: str | Path | None = None,
        out: str | Path | None = None,
        batch_size: int = 64,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Evaluation:
        """Counts the model's hits on a split, each image once, on the GPU where there is one.

        Args:
            data: A data set's folder, a folder with class folders, or `digits://`.
            split: Its name; class folders that lie in the folder itself have none.
            crop: Side of the center crop, pixels; default: the card's.
            resize: Length of the shorter side before it, pixels; default: in the card's ratio to the crop.
            interpolation: Filter of the resize; default: the card's.
            tta: `flip` or `ten-crop`: averaged views, as a second result.
            labels: JSON file with the classes that count as right for each image, as ImageNet-ReaL's.
            out: Folder for scores, classes, confusion and each image's prediction, as JSON and CSV.
            batch_size: Images at once.
            progress: Is told how many of how many views are done.

        Raises:
            UserError: a value is not known, sizes do not fit, or `out` cannot be written.
            DataError: there is no such split, or its classes or labels do not fit.
        """
        transform = override_transform(self.card, crop, resize, interpolation, tta)
        return evaluate(
            self.module,
            self.card,
            self._index(data, split),
            transform,
            name=self.place,
            data=str(data),
            split=split,
            tta=tta,
            labels=None if labels is None else Path(labels),
            out=None if out is None else Path(out),
            batch_size=batch_size,
            progress=progress,
        )

    def export(
        self,
        to: str,
        out: str | Path,
        *,
        data: str | Path | None = None,
        split: str = "val",
        calibrate: str = "train",
        images: int = 512,
    ) -> Exported:
        """Writes the model for other programs, after its logits were compared with torch's.

        Args:
            to: `onnx`, `torch` (torch.export), `timm` (a folder as on a hub), or `int8` (ONNX for the CPU).
            out: Folder.
            data: For int8: a data set to calibrate and to measure with.
            split: For int8: the split to measure on.
            calibrate: For int8: the split to take ranges from.
            images: For int8: images to take ranges from.

        Raises:
            UserError: the format is not known, the extra `export` is not installed, or `out` cannot be written.
            TrainingError: the logits differ; nothing is written.
        """
        if to not in FORMATS:
            raise UserError(f"--to={to} is not known: use {', '.join(FORMATS)}.")
        if to == "int8" and data is None:
            raise UserError("--to int8 needs --data, a data set to calibrate and measure with.")
        with extra("export"):
            from pipeline.export import formats, int8
        model, card, folder = self.module.cpu(), self.card, Path(out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if to == "int8":
                calibration, index = (self._index(str(data), name) for name in (calibrate, split))
                found = int8.quantize(model, card, folder, calibration, index, images)
                return Exported(found[1].file, fp32=found[0], int8=found[1])
            write = {"onnx": formats.to_onnx, "torch": formats.to_torch, "timm": formats.to_timm}[to]
            file = write(model, card, folder)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror or error}.") from error
        return Exported(str(file), formats.TOLERANCE, formats.OPSET if to == "onnx" else None)

    def _index(self, data: str | Path, split: str) -> DatasetIndex:
        root = resolve_data_root(data, self._cache)
        return open_split(root, split, self._cache / "index", self.card.max_pixels)
