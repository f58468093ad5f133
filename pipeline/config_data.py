"""The config's sections about images: `data`, `augment` and `eval`."""

import difflib
from typing import Annotated, Any, Literal

import fsspec
from pydantic import Field, model_validator

from pipeline.config_fields import (
    Auto,
    ByteSize,
    Count,
    Fraction,
    Interpolation,
    Location,
    Name,
    Rgb,
    Section,
    Uri,
    registered,
)
from pipeline.extension_points import AUGMENTATIONS, DATA_SOURCES, is_generated
from pipeline.formatting import parse_bytes
from pipeline.limits import MAX_PIXELS


def _check_scheme(root: str) -> None:
    """Raises `ValueError`, with the closest name, if no data source or file system has the URI's scheme."""
    scheme, known = root.partition("://")[0].rpartition("::")[2], [*DATA_SOURCES, *fsspec.available_protocols()]
    if scheme not in known:
        near = difflib.get_close_matches(scheme, known, n=1)
        hint = f"did you mean '{near[0]}://'?" if near else f"plugins add more to {', '.join(DATA_SOURCES)}"
        raise ValueError(f"root={root}: no data source or file system is called {scheme}; {hint}")


class Data(Section):
    """`data.*`: the data set, reading, shuffling, cropping, resizing and normalization."""

    root: Annotated[Uri | None, Location("input")] = Field(
        None,
        description="path or URI (s3://...) of a data set with an index, or folder with class folders in each split",
    )
    train: Name = Field("train", description="name of the training split")
    val: Name = Field("val", description="name of the evaluation split")
    classes: Annotated[str | None, Location("input")] = Field(
        None, description="text file with the classes to train on, one per line; a second column merges classes"
    )
    license: str | None = Field(
        None, description="license of the data, recorded with the registered model; null: the one in dataset.json"
    )
    stage: Annotated[str | None, Location("local")] = Field(
        None, description="local folder on each node's own disk, to which shards are copied before training"
    )
    stage_limit: ByteSize | None = Field(
        None,
        description="maximum disk space in `stage` on each node (200GB, 1.5TB): with the windowed shuffle, shards are "
        "fetched ahead of use and evicted after it; null: everything is copied",
    )
    on_corrupt: Literal["error", "skip"] = Field(
        "error", description="corrupt training images: `error` ends the run, `skip` replaces them by other images"
    )
    max_pixels: Count = Field(
        MAX_PIXELS, description="images with more pixels are errors; the model card records the limit"
    )
    shuffle: Literal["full", "windowed"] = Field(
        "full", description="shuffle over the whole split (`full`), or within windows of shards (`windowed`)"
    )
    window: Count = Field(16, description="shuffle window of `windowed`, in shards")
    image_size: int = Field(
        224, ge=8, le=1024, description="training image size after the random crop, pixels per side"
    )
    progressive_resize: tuple[tuple[float, int], ...] = Field(
        (),
        description="progressive resizing: [epoch, size] pairs, each size until its epoch; then `image_size`",
    )
    scale: tuple[float, float] = Field(
        (0.08, 1.0), description="random resized crop: range of the crop's fraction of the image area"
    )
    ratio: tuple[float, float] = Field(
        (3 / 4, 4 / 3), description="random resized crop: range of the crop's aspect ratio, width / height"
    )
    hflip: Fraction = Field(0.5, description="probability of a random horizontal flip")
    mean: Rgb = Field((0.485, 0.456, 0.406), description="normalization mean per channel, of pixel values in [0, 1]")
    std: Rgb = Field(
        (0.229, 0.224, 0.225), description="normalization standard deviation per channel, of pixel values in [0, 1]"
    )
    interpolation: Interpolation = Field(
        "bilinear", description="interpolation of the training resize, always antialiased"
    )
    threads: Count | Auto = Field(
        "auto", description="data loader: DALI decoding threads per worker; auto: the worker's CPU cores"
    )
    readers: int = Field(
        4,
        ge=0,
        le=256,
        description="data loader: threads per worker that read files ahead; 0: the planning thread reads them",
    )

    @model_validator(mode="after")
    def _ranges(self) -> "Data":
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale={[low, high]} must be two numbers with 0 < low <= high <= 1")
        low, high = self.ratio
        if not 0 < low <= high:
            raise ValueError(f"ratio={[low, high]} must be two numbers with 0 < low <= high")
        if min(self.std) <= 0:
            raise ValueError(f"std={list(self.std)} must be positive")
        if self.root is not None and "://" in self.root and not is_generated(self.root):
            _check_scheme(self.root)
            if self.stage is None:
                raise ValueError(f"root={self.root} is a URI: set stage to a folder on each node's own disk")
        if self.stage_limit is not None and self.stage is None:
            raise ValueError(
                f"stage_limit={self.stage_limit} limits the disk space of staged shards: set stage to a folder on each "
                f"node's own disk, or omit stage_limit"
            )
        epochs = [epoch for epoch, _ in self.progressive_resize]
        if (
            epochs != sorted(set(epochs))
            or any(e <= 0 for e in epochs)
            or any(size < 8 for _, size in self.progressive_resize)
        ):
            pairs = [list(pair) for pair in self.progressive_resize]
            raise ValueError(
                f"progressive_resize={pairs} must be [epoch, size] pairs with increasing epochs and sizes >= 8"
            )
        return self

    @property
    def stage_limit_bytes(self) -> int | None:
        """`stage_limit` in bytes."""
        return None if self.stage_limit is None else parse_bytes(str(self.stage_limit))

    @property
    def streams(self) -> bool:
        """Whether training reads shards from a cache of limited size, instead of a folder with all of them."""
        return self.stage_limit is not None and self.shuffle == "windowed"

    @property
    def max_image_size(self) -> int:
        """The largest training image size, pixels per side."""
        return max(self.image_size, *(size for _, size in self.progressive_resize), 0)

    def image_size_at(self, epoch: float) -> int:
        """Returns the training image size at an epoch, pixels per side."""
        return next((size for until, size in self.progressive_resize if epoch < until), self.image_size)


class Augment(Section):
    """`augment.*`: augmentations of training images in addition to crop and flip."""

    brightness: Fraction = Field(0, description="color jitter: brightness factor uniform in [1 - b, 1 + b]")
    contrast: Fraction = Field(0, description="color jitter: contrast factor uniform in [1 - c, 1 + c]")
    saturation: Fraction = Field(0, description="color jitter: saturation factor uniform in [1 - s, 1 + s]")
    lighting: float = Field(0, ge=0, description="AlexNet's PCA lighting noise: standard deviation; the paper's is 0.1")
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = Field(
        "none", description="automatic augmentation policy: DALI's RandAugment or TrivialAugment"
    )
    randaugment_num_ops: int = Field(2, ge=1, le=8, description="RandAugment: operators per image")
    randaugment_magnitude: int = Field(9, ge=0, le=30, description="RandAugment: magnitude, 0 to 30")
    erase_prob: Fraction = Field(0, description="random erasing: probability")
    erase_scale: tuple[float, float] = Field(
        (0.02, 1 / 3), description="random erasing: range of the box's fraction of the image area"
    )
    erase_ratio: tuple[float, float] = Field(
        (0.3, 3.3), description="random erasing: range of the box's aspect ratio, height / width"
    )
    erase_fill: Literal["mean", "noise"] = Field(
        "mean", description="random erasing: fill with the mean color or with noise"
    )
    mixup_alpha: float = Field(
        0, ge=0, description="mixup: alpha of the Beta distribution of the mixing weight; 0: no mixup"
    )
    cutmix_alpha: float = Field(
        0, ge=0, description="CutMix: alpha of the Beta distribution of the mixing weight; 0: no CutMix"
    )
    mix_prob: Fraction = Field(1, description="mixup and CutMix: probability per pair of images")
    mix_switch_prob: Fraction = Field(0.5, description="probability of CutMix instead of mixup if both are on")
    custom: tuple[Annotated[str, registered(AUGMENTATIONS)], ...] = Field(
        (), description="augmentations of plugins by name, applied in order before mixup and CutMix"
    )

    @model_validator(mode="after")
    def _ranges(self) -> "Augment":
        low, high = self.erase_scale
        if not 0 < low <= high < 1:
            raise ValueError(f"erase_scale={[low, high]} must be two numbers with 0 < low <= high < 1")
        low, high = self.erase_ratio
        if not 0 < low <= high:
            raise ValueError(f"erase_ratio={[low, high]} must be two numbers with 0 < low <= high")
        return self

    @property
    def color_jitter(self) -> bool:
        """Whether color jitter or PCA lighting is on."""
        return bool(self.brightness or self.contrast or self.saturation or self.lighting)

    @property
    def auto_augment_num_ops(self) -> int:
        """Operators per image of `auto_augment`; 0 if it is off."""
        return {"none": 0, "randaugment": self.randaugment_num_ops, "trivialaugment": 1}[self.auto_augment]

    @property
    def mixes_images(self) -> bool:
        """Whether mixup or CutMix mix pairs of images."""
        return bool(self.mixup_alpha or self.cutmix_alpha)


_EVAL_PRESETS: dict[str, tuple[float, Interpolation]] = {  # crop / resize, interpolation
    "torchvision": (224 / 256, "bilinear"),  # torchvision.transforms._presets.ImageClassification's defaults
    "timm": (0.875, "bicubic"),  # timm.data.constants: DEFAULT_CROP_PCT and its models' usual interpolation
}


def describe_transform(resize: int, interpolation: Interpolation, crop: int) -> str:
    """Describes an evaluation transform in one line, which is printed with every accuracy."""
    return f"resize {resize} {interpolation} antialias, center crop {crop}, no EXIF rotation"


class Eval(Section):
    """`eval.*`: interval, batch size and image transform of evaluation."""

    transform: Literal["torchvision", "timm"] = Field(
        "torchvision", description="evaluation preset: sets the defaults of `resize` and `interpolation`"
    )
    crop: int = Field(224, ge=8, le=1024, description="center crop, pixels per side")
    resize: int = Field(
        256, ge=8, le=2048, description="size of the shorter side after the resize, pixels; default: crop / 0.875"
    )
    interpolation: Interpolation = Field(
        "bilinear", description="interpolation of the resize, always antialiased; default: bilinear, bicubic for `timm`"
    )
    batch_size: Count | Auto = Field(
        "auto", description="evaluation batch size per worker; auto: the training micro-batch per device"
    )
    every_epochs: Count = Field(1, description="evaluation interval, epochs; the end of the run is always evaluated")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """Fills in the preset's sizes and interpolation, so that a saved config contains them."""
        presets = list(_EVAL_PRESETS)  # a list: the value is not validated yet and may be unhashable
        if not isinstance(values, dict) or values.get("transform", "torchvision") not in presets:
            return values
        crop_ratio, interpolation = _EVAL_PRESETS[values.get("transform", "torchvision")]
        crop = values.get("crop", 224)
        defaults: dict[str, Any] = {"interpolation": interpolation}
        if isinstance(crop, int):
            defaults["resize"] = int(crop / crop_ratio)
        return defaults | values

    @model_validator(mode="after")
    def _crop_fits(self) -> "Eval":
        if self.crop > self.resize:
            raise ValueError(f"crop={self.crop} must not exceed resize={self.resize}")
        return self

    @property
    def description(self) -> str:
        """The transform in one line, which is printed with every accuracy."""
        return describe_transform(self.resize, self.interpolation, self.crop)
