"""The model card, `model.json`: the description that is stored next to a model's weights.

The packaged model (`pipeline/export/pyfunc_model.py`) parses it with its own code, since it must work without this
project.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Model
from pipeline.config_data import describe_transform
from pipeline.config_fields import Interpolation, Rgb
from pipeline.errors import UserError
from pipeline.limits import MAX_PIXELS

CARD = "model.json"


@dataclass(frozen=True)
class Transform:
    """The evaluation transform: resizes the shorter side to `resize`, center-crops `crop` pixels, normalizes.

    `mean` and `std` are per channel, for pixel values in [0, 1].
    """

    resize: int
    crop: int
    interpolation: Interpolation
    mean: Rgb
    std: Rgb

    @property
    def description(self) -> str:
        """The transform in one line; it is printed next to every accuracy."""
        return describe_transform(self.resize, self.interpolation, self.crop)

    def override(self, crop: int | None, resize: int | None, interpolation: Interpolation | None) -> "Transform":
        """Returns a copy with other sizes or another filter. A crop without a resize keeps the crop/resize ratio."""
        if crop is not None and resize is None:
            resize = int(crop * self.resize / self.crop)
        changes = {"crop": crop, "resize": resize, "interpolation": interpolation}
        return replace(self, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class ModelCard:
    """Everything needed to run a model, and its origin.

    Attributes:
        name: Model name (`model.name`).
        architecture: Constructor arguments of the model, as in `pipeline.model.architectures`.
        weights: Name of the weights file in the card's folder.
        max_pixels: Largest accepted image, in pixels.
        metrics: Evaluation counts of these weights; None if they were not evaluated.
        config_hash: Prefix of the SHA-256 of the run's config.
    """

    name: str
    architecture: dict[str, Any]
    num_classes: int
    classes: tuple[str, ...]
    weights: str
    transform: Transform
    max_pixels: int = MAX_PIXELS  # cards of older models lack this field
    metrics: dict[str, Any] | None = None
    samples_seen: int = 0
    epoch: float = 0.0
    config_hash: str = ""

    @classmethod
    def read(cls, folder: Path) -> "ModelCard":
        """Reads the card of a checkpoint folder or of a downloaded registered model.

        Raises:
            UserError: The file is missing, is corrupt, or lacks a field.
        """
        file = folder / CARD
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            transform = content["transform"]
            content["transform"] = Transform(**{**transform, **{key: tuple(transform[key]) for key in ("mean", "std")}})
            content["classes"] = tuple(content["classes"])
            known = {field.name for field in fields(cls)}
            return cls(**{key: value for key, value in content.items() if key in known})
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not a model card of this project ({type(error).__name__}: {error}): pass a checkpoint "
                f"folder."
            ) from error

    def write(self, folder: Path) -> Path:
        """Writes `model.json` to the folder and returns its path."""
        file = folder / CARD
        file.write_text(self.to_json(), encoding="utf-8")
        return file

    def to_json(self) -> str:
        """Returns the content of `model.json`.

        Raises:
            ValueError: A number is NaN or infinite, which JSON cannot represent.
        """
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @property
    def in_chans(self) -> Literal[1, 3]:
        """Number of input channels: 3 for RGB, 1 for grayscale (luma)."""
        return 1 if self.architecture.get("in_chans", 3) == 1 else 3

    @property
    def small_stem(self) -> bool:
        """Whether the model has the CIFAR stem: one 3x3 convolution, for images of 32 pixels."""
        return self.architecture.get("stem_type") == "cifar"

    @property
    def model(self) -> Model:
        """The config section `model` that builds this model."""
        options = {key: self.architecture[key] for key in ("in_chans", "global_pool") if key in self.architecture}
        return Model(name=self.name, **options)
