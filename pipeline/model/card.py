"""The card of a model, `model.json`: the one description that travels with its weights.

The packaged model (`pipeline/export/pyfunc_model.py`) reads it by itself, since it must work without this project.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config import MAX_PIXELS, Interpolation, Model, Rgb, describe_transform
from pipeline.errors import UserError

CARD = "model.json"


@dataclass(frozen=True)
class Transform:
    """The evaluation transform: shorter side to `resize`, center crop of `crop` (pixels), normalized.

    `mean` and `std` are per channel, of pixel values in [0, 1].
    """

    resize: int
    crop: int
    interpolation: Interpolation
    mean: Rgb
    std: Rgb

    @property
    def description(self) -> str:
        """The transform in one line, to stand beside every accuracy."""
        return describe_transform(self.resize, self.interpolation, self.crop)

    def at(self, crop: int | None, resize: int | None, interpolation: Interpolation | None) -> "Transform":
        """With other sizes or another filter; a crop alone keeps the ratio of crop to resize."""
        if crop is not None and resize is None:
            resize = int(crop * self.resize / self.crop)
        changes = {"crop": crop, "resize": resize, "interpolation": interpolation}
        return replace(self, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class ModelCard:
    """What is needed to use a model, and where it comes from.

    `architecture` are the arguments that build the model `name`, as `pipeline.model.architectures` has them; `weights` is
    the file beside the card; `max_pixels` the largest image that it takes. `metrics` are the counts of the evaluation
    of these weights, None where there was none; `config_hash` begins the SHA-256 of the run's config.
    """

    name: str
    architecture: dict[str, Any]
    num_classes: int
    classes: tuple[str, ...]
    weights: str
    transform: Transform
    max_pixels: int = MAX_PIXELS  # models that were made before the limit could be set do not tell it
    metrics: dict[str, Any] | None = None
    samples_seen: int = 0
    epoch: float = 0.0
    config_hash: str = ""

    @classmethod
    def read(cls, folder: Path) -> "ModelCard":
        """The card of a checkpoint's or a registered model's folder.

        Raises:
            UserError: there is none, it is corrupt, or something is missing in it.
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
                f"{file} is no model card of this project ({type(error).__name__}: {error}): give a checkpoint's "
                f"folder."
            ) from error

    def write(self, folder: Path) -> Path:
        """Writes `model.json`; returns the file."""
        file = folder / CARD
        file.write_text(self.to_json(), encoding="utf-8")
        return file

    def to_json(self) -> str:
        """The content of `model.json`.

        Raises:
            ValueError: a number is NaN or infinite, which JSON does not know.
        """
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @property
    def in_chans(self) -> Literal[1, 3]:
        """Channels of the model's images: 3 for RGB, 1 for luma."""
        return 1 if self.architecture.get("in_chans", 3) == 1 else 3

    @property
    def small_stem(self) -> bool:
        """Whether the model begins with one 3x3 convolution, as those for images of 32 pixels do."""
        return self.architecture.get("stem_type") == "cifar"

    @property
    def model(self) -> Model:
        """The config's section that builds the model."""
        usual = {key: self.architecture[key] for key in ("in_chans", "global_pool") if key in self.architecture}
        return Model(name=self.name, **usual)
