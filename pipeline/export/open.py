"""Opens a trained model by URI or path, for prediction, evaluation and export."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.config_fields import Interpolation
from pipeline.data.dataset import open_split
from pipeline.data.index import DatasetIndex
from pipeline.data.open import resolve_data_root
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import Evaluation, evaluate, override_transform
from pipeline.export.predict import FolderPredictions, ImageInput, Prediction, Predictor, predict_folder
from pipeline.extras import requires_extra
from pipeline.model.card import ModelCard
from pipeline.model.densenet import create
from pipeline.model.timm_files import card_from_weights
from pipeline.model.weights import load_model, load_weights
from pipeline.tracking.stores import Stores, stores_from_options
from pipeline.train.model_source import resolve_model

if TYPE_CHECKING:
    from pipeline.export.int8 import OnnxResult


def open_model(
    model_uri: str | Path,
    *,
    classes: Sequence[str] | None = None,
    stores: Stores | None = None,
    cache: str | Path = "outputs",
) -> "TrainedModel":
    """Opens a model; its weights are loaded on first use.

    Args:
        model_uri: models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/NAME; a run folder (its best checkpoint is
            used); a checkpoint folder; or a .safetensors or .pth file of a DenseNet with parameter names of timm or
            torchvision.
        classes: For a weights file: the class names in the order of the logits. Default: those in timm's `config.json`
            in the same folder, else ImageNet's if their number matches.
        stores: Tracking store and model registry. Default: those of the environment, else a SQLite file in `cache`.
        cache: Folder for downloaded models and indexes of class folders; the `run.output` of training runs.

    Raises:
        UserError: There is no such model, or the model or class names of a weights file are unknown.
    """
    output = Path(cache).absolute()
    path = resolve_model(str(model_uri), "MODEL", output / "models", stores or stores_from_options(None, None, output))
    if path.is_file():
        return TrainedModel(str(model_uri), path, card_from_weights(path, classes), output)
    card = ModelCard.read(path)
    if classes is not None:
        raise UserError(f"classes has no effect: {path} has a model card with class names. Omit classes.")
    return TrainedModel(str(model_uri), path, card, output)


FORMATS = ("onnx", "torch", "timm", "int8")


@dataclass(frozen=True)
class Exported:
    """An exported model: a file, or a folder for timm.

    Its logits equal torch's within `tolerance`; `opset` is the ONNX opset. For an int8 export, whose logits differ,
    `fp32` and `int8` have accuracy, speed and size of the fp32 and the quantized ONNX file.
    """

    file: str
    tolerance: float | None = None
    opset: int | None = None
    fp32: "OnnxResult | None" = None
    int8: "OnnxResult | None" = None


class TrainedModel:
    """A model from `open_model`: `model_uri` is the argument passed there, `card` the model card."""

    def __init__(self, model_uri: str, path: Path, card: ModelCard, cache: Path) -> None:
        self.model_uri, self.card, self._path, self._cache = model_uri, card, path, cache

    def __repr__(self) -> str:
        return f"TrainedModel({self.model_uri}: {self.card.name}, {self.card.num_classes} classes)"

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the logits."""
        return self.card.classes

    @property
    def weights(self) -> Path:
        """Path of the weights file."""
        return self._path if self._path.is_file() else self._path / self.card.weights

    @cached_property
    def module(self) -> nn.Module:
        """The torch module, in evaluation mode: images [N, C, H, W] after the card's transform to logits [N, K]."""
        if not self._path.is_file():
            return load_model(self._path)
        model = create(self.card.model, self.card.num_classes)
        load_weights(model, self._path)
        return model.eval()

    def predict(self, images: ImageInput | Sequence[ImageInput], topk: int = 5) -> list[Prediction]:
        """Predicts the `topk` most probable classes of each image on the CPU, with the code of packaged models.

        Args:
            images: One image or several: paths, bytes of image files, or uint8 arrays [H, W, 3] (RGB), [H, W] (gray)
                or [H, W, 4] (RGBA).
            topk: Number of classes per image.

        Raises:
            UserError: A file is missing or is not an image, or the model outputs NaN or infinities for it.
        """
        single = isinstance(images, str | Path | bytes) or hasattr(images, "dtype")
        batch: Any = [images] if single else images
        return self._predictor.predict(batch, topk)

    @cached_property
    def _predictor(self) -> Predictor:
        module = self.module.cpu()  # `evaluate` may have moved it to the GPU
        return Predictor(self.card, module.state_dict(), str(self._path))

    def predict_folder(
        self,
        images: str | Path,
        out: str | Path,
        *,
        topk: int = 5,
        batch_size: int = 64,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> FolderPredictions:
        """Classifies all files in a folder tree, on the GPU if there is one, and writes the Parquet file `out`.

        The table has one row per file: `image` (path relative to the folder); `class_id`, `class_name` and
        `probability` of the best class; `top_class_ids` and `top_probabilities`; or the problem of the file in `error`.
        `progress` receives the number of classified images and the total.

        Raises:
            UserError: There are no files, or `out` cannot be written.
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
        classes: str | Path | None = None,
        out: str | Path | None = None,
        batch_size: int = 64,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Evaluation:
        """Evaluates the model on a split, each image once, on the GPU if there is one.

        Args:
            data: Folder of a data set, folder with class folders, or `digits://`.
            split: Name of the split; ignored if the class folders are in `data` itself.
            crop: Size of the center crop in pixels; default: that of the model card.
            resize: Length of the shorter side after the resize, pixels; default: keeps the card's ratio to the crop.
            interpolation: Filter of the resize; default: that of the model card.
            tta: Test-time augmentation, `flip` or `ten-crop`: adds scores of averaged probabilities.
            labels: JSON file with the classes that count as correct for each image, like ImageNet-ReaL.
            classes: File with the classes to evaluate, one per line; a second column merges them (`data.classes`).
            out: Folder for scores, per-class accuracy, confusion matrix and predictions, as JSON and CSV.
            batch_size: Images per batch.
            progress: Receives the number of processed views and the total.

        Raises:
            UserError: A value is unknown, the sizes do not fit, or `out` cannot be written.
            DataError: There is no such split, or its classes or the labels do not match.
        """
        transform = override_transform(self.card, crop, resize, interpolation, tta)
        return evaluate(
            self.module,
            self.card,
            self._index(data, split, None if classes is None else Path(classes)),
            transform,
            name=self.model_uri,
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
        """Exports the model and checks the exported logits against torch's.

        Args:
            to: `onnx`, `torch` (torch.export), `timm` (a folder as on the Hugging Face Hub), or `int8` (quantized ONNX
                for the CPU).
            out: Output folder.
            data: For int8: data set for calibration and evaluation.
            split: For int8: split for evaluation.
            calibrate: For int8: split for calibration.
            images: For int8: number of calibration images.

        Raises:
            UserError: The format is unknown, the extra `export` is not installed, or `out` cannot be written.
            TrainingError: The logits differ; nothing is written.
        """
        if to not in FORMATS:
            raise UserError(f"--to={to} is not known: use {', '.join(FORMATS)}.")
        if to == "int8" and data is None:
            raise UserError("--to int8 needs --data, a data set for calibration and evaluation.")
        with requires_extra("export"):
            from pipeline.export import formats, int8
        model, card, folder = self.module.cpu(), self.card, Path(out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if to == "int8":
                calibration, index = (self._index(str(data), name) for name in (calibrate, split))
                fp32_result, int8_result = int8.quantize(model, card, folder, calibration, index, images)
                return Exported(int8_result.file, fp32=fp32_result, int8=int8_result)
            write = {"onnx": formats.to_onnx, "torch": formats.to_torch, "timm": formats.to_timm}[to]
            file = write(model, card, folder)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror or error}.") from error
        return Exported(str(file), formats.TOLERANCE, formats.OPSET if to == "onnx" else None)

    def _index(self, data: str | Path, split: str, classes: Path | None = None) -> DatasetIndex:
        root = resolve_data_root(data, self._cache)
        return open_split(root, split, self._cache / "index", self.card.max_pixels, classes)
