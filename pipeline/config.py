"""The configuration schema of a run, and its validation. `pipeline/config_file.py` loads it from YAML."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import fsspec
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.extension_points import AUGMENTATIONS, DATA_SOURCES, OPTIMIZERS, SCHEDULES, TRACKERS, is_generated
from pipeline.mlflow_names import alias_error, experiment_name_error, model_name_error
from pipeline.plugins import import_plugins, is_file
from pipeline.registry import Registry

MAX_PIXELS = 178_956_970  # default limit per image, the same as PIL's against decompression bombs

Auto = Literal["auto"]
Device = Literal["cpu", "cuda"]
Interpolation = Literal["bilinear", "bicubic"]
MemoryMode = Literal["none", "activation-checkpointing", "shared-stats", "fused"]
Precision = Literal["fp32", "bf16", "fp16"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rgb = tuple[float, float, float]


def _plain_name(name: str) -> str:
    if not name or any(c in name for c in "/\\\0") or name.startswith("."):
        raise ValueError("must be a plain folder name: no slashes, no leading dot")
    return name


def _no_password(uri: str) -> str:
    if re.search(r"://[^/@:]*:[^/@]+@", uri):
        raise ValueError("must not contain a password, since configs are saved and logged: use environment variables")
    return uri


def _check_scheme(root: str) -> None:
    """Raises `ValueError`, with the closest name, if no data source or file system has the URI's scheme."""
    scheme, known = root.partition("://")[0].rpartition("::")[2], [*DATA_SOURCES, *fsspec.available_protocols()]
    if scheme not in known:
        near = difflib.get_close_matches(scheme, known, n=1)
        hint = f"did you mean '{near[0]}://'?" if near else f"plugins add more to {', '.join(DATA_SOURCES)}"
        raise ValueError(f"root={root}: no data source or file system is called {scheme}; {hint}")


def _valid_by(error_of: Callable[[str], str | None]) -> AfterValidator:
    """Returns a validator that rejects a name for which `error_of` returns an error."""

    def check(name: str) -> str:
        error = error_of(name)
        if error is not None:
            raise ValueError(error)
        return name

    return AfterValidator(check)


def _registered(registry: Registry[Any]) -> AfterValidator:
    return AfterValidator(registry.check)


Name = Annotated[str, AfterValidator(_plain_name)]
Uri = Annotated[str, AfterValidator(_no_password)]


@dataclass(frozen=True)
class Location:
    """Marks a key whose value is a path or URI; `pipeline.locations` finds them.

    All nodes must see the same `input` and `output`; `local` is on each node's own disk, `store` is an MLflow store.
    Values for which `matches` is false are not locations.
    """

    kind: Literal["input", "output", "local", "store"]
    matches: Callable[[str], bool] = lambda value: True


_FastDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C if PyYAML was built with libyaml: ten times as fast


_INTERPOLATION = re.compile(r"(\\*)\$\{")


class _Dumper(_FastDumper):  # type: ignore[misc, valid-type]
    """Quotes strings that OmegaConf, unlike PyYAML, parses as numbers: `1e5`."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _import_plugins(plugins: tuple[str, ...]) -> tuple[str, ...]:
    """Imports the plugins before other keys are validated: `run` is the first section."""
    import_plugins(plugins)
    return plugins


class Section(BaseModel):
    """A section of the config: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Run(Section):
    """`run.*`: name, output folder, seed and plugins of a run."""

    name: Name | None = Field(
        None,
        description="run folder in `run.output`; the same name again resumes; default: CONFIG-YYYYmmdd-HHMMSS-XXXXXX",
    )
    output: Annotated[str, Location("output")] = Field(
        "outputs", description="folder for runs, checkpoints, the data index and the default tracking store"
    )
    seed: int = Field(
        0, ge=0, lt=2**64, description="random seed of the initial weights, the sample order and every augmentation"
    )
    plugins: Annotated[tuple[str, ...], AfterValidator(_import_plugins), Location("input", is_file)] = Field(
        (), description="modules or .py files that register your own optimizers, models, ... (docs/extending.md)"
    )

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Imports the plugins when a config is unpickled in another process."""
        super().__setstate__(state)
        import_plugins(self.plugins)


class Model(Section):
    """`model.*`: the architecture, its memory mode and its pretrained weights."""

    name: str = Field(
        "densenet121", description="architecture: a DenseNet, or any other image classifier in timm's registry"
    )
    num_classes: Count | None = Field(None, description="number of logits; default: the number of classes in the data")
    in_chans: Literal[1, 3] = Field(3, description="input channels; 3: RGB, 1: grayscale (ITU-R BT.601 luma)")
    global_pool: Literal["avg", "max", "avgmax", "catavgmax"] = Field(
        "avg", description="global pooling before the classifier; avg: the architecture's own"
    )
    drop_rate: float = Field(0, ge=0, lt=1, description="dropout rate before the classifier")
    layer_drop_rate: float = Field(0, ge=0, lt=1, description="dropout rate after each dense layer (DenseNets)")
    memory: MemoryMode = Field(
        "none",
        description="save GPU memory in DenseNets, if out of memory: recompute activations in the backward pass "
        "instead of storing them; fused: also without concatenation, by Triton kernels",
    )
    weights: Annotated[str | None, Location("input")] = Field(
        None,
        description="pretrained weights: a .safetensors or .pth file, a checkpoint or run folder, or "
        "models:/NAME@ALIAS",
    )


class Finetune(Section):
    """`finetune.*`: frozen layers and learning rates per layer."""

    freeze_blocks: int = Field(
        0,
        ge=0,
        le=4,
        description="number of dense blocks to freeze, together with the stem (DenseNets); 0: train all layers",
    )
    freeze_batch_norm: bool = Field(
        False, description="freeze batch norm: all norms use their running statistics and are not trained"
    )
    layer_decay: float = Field(
        1,
        gt=0,
        le=1,
        description="layer-wise learning rate decay: factor per dense block, or stage, away from the classifier",
    )
    head_lr_mult: float = Field(1, gt=0, description="learning rate multiplier of the classifier")


class Data(Section):
    """`data.*`: the data set, reading, shuffling, cropping, resizing and normalization."""

    root: Annotated[Uri | None, Location("input")] = Field(
        None,
        description="path or URI (s3://...) of a prepared data set, or a folder with class folders in each split",
    )
    train: Name = Field("train", description="name of the training split")
    val: Name = Field("val", description="name of the evaluation split")
    license: str | None = Field(None, description="license of the data, recorded with the registered model")
    stage: Annotated[str | None, Location("local")] = Field(
        None, description="local folder on each node's own disk, to which shards are copied before training"
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
    custom: tuple[Annotated[str, _registered(AUGMENTATIONS)], ...] = Field(
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


class Train(Section):
    """`train.*`: epochs, batch size, mixed precision, and recovery from NaN and out of memory."""

    epochs: float = Field(
        90, gt=0, description="number of epochs (passes over the training split); fractions are allowed"
    )
    global_batch_size: Count = Field(
        256, description="images per optimizer step over all workers; gradient accumulation where devices hold fewer"
    )
    max_device_batch_size: Count = Field(
        64,
        description="largest micro-batch per device; lower it if out of memory: gradient accumulation fills up "
        "the batch",
    )
    precision: Auto | Precision = Field(
        "auto",
        description="mixed precision (autocast): bf16 or fp16 (loss scaling; needs ZeRO stage 0); auto: bf16 on "
        "CUDA, fp32 on the CPU",
    )
    log_every_steps: Count = Field(10, description="logging interval, optimizer steps")
    on_nan: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="if the loss is NaN or infinite: `stop` the run, `skip` the step, or `rewind` to the latest "
        "checkpoint",
    )
    nan_limit: Count = Field(10, description="maximum number of skipped steps or rewinds, after which the run ends")
    on_out_of_memory: Literal["stop", "halve"] = Field(
        "stop",
        description="if out of memory: `stop`, or `halve` the micro-batch per device, before training, until it fits",
    )
    profile_steps: tuple[Count, Count] | None = Field(
        None, description="profile steps [first, last] on rank 0; the trace goes to the run's folder and artifacts"
    )

    @model_validator(mode="after")
    def _profile(self) -> "Train":
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)} must be [first, last] with first <= last")
        return self


class Optim(Section):
    """`optim.*`: the optimizer, learning rate, weight decay and gradient clipping."""

    name: Annotated[str, _registered(OPTIMIZERS)] = Field(
        "sgd",
        description="optimizer: `sgd`, `adamw`, `lamb`, `lars`, `muon` (the last three need ZeRO stage 0), or a "
        "plugin's",
    )
    lr: float = Field(0.1, gt=0, description="peak learning rate, before `lr_scaling`")
    lr_scaling: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description="scale the learning rate by global batch size / `lr_base_batch` (linear), or by its square root",
    )
    lr_base_batch: Count = Field(256, description="global batch size for which `lr` is meant, if it is scaled")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of `sgd`, `lars` and `muon`")
    nesterov: bool = Field(True, description="Nesterov momentum of `sgd`, `lars` and `muon`; no effect at momentum 0")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="Adam betas of `adamw`, `lamb` and `muon`, each below 1"
    )
    eps: float = Field(1e-8, gt=0, description="Adam epsilon of `adamw`, `lamb` and `muon`")
    weight_decay: float = Field(
        1e-4, ge=0, description="weight decay of convolution and linear weights; none for biases and norms"
    )
    clip_grad_norm: float | None = Field(
        None, gt=0, description="gradient clipping: maximum global gradient norm; null: no clipping"
    )

    @model_validator(mode="after")
    def _below_one(self) -> "Optim":
        if max(self.betas) >= 1:
            raise ValueError(f"betas={list(self.betas)} must each be below 1")
        return self

    @property
    def needs_full_weights(self) -> bool:
        """Whether the optimizer computes on whole weight tensors, which ZeRO 1-3 shard."""
        return OPTIMIZERS[self.name].needs_full_weights

    def peak_lr(self, global_batch_size: int) -> float:
        """Returns the scaled learning rate: linear (Goyal et al. 2017, arXiv 1706.02677) or by the square root."""
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.lr_scaling]
        return self.lr * (global_batch_size / self.lr_base_batch) ** power


class Loss(Section):
    """`loss.*`: the loss function, label smoothing and knowledge distillation."""

    name: Literal["cross-entropy", "bce"] = Field(
        "cross-entropy", description="loss function; `bce`: binary cross-entropy, mean over the classes"
    )
    label_smoothing: float = Field(
        0, ge=0, lt=1, description="label smoothing: fraction of the target that is spread over all classes"
    )
    teacher: Annotated[str | None, Location("input")] = Field(
        None,
        description="knowledge distillation: teacher model, models:/NAME@ALIAS or a checkpoint or run folder",
    )
    distillation_alpha: Fraction = Field(
        0.5, description="knowledge distillation: weight of the teacher's loss; the labels' loss has 1 - alpha"
    )
    distillation_temperature: float = Field(
        1, gt=0, description="knowledge distillation: temperature that divides the logits of teacher and student"
    )


class Ema(Section):
    """`ema.*`: exponential moving average (EMA) of the weights."""

    decay: float | None = Field(
        None, ge=0, lt=1, description="EMA (exponential moving average) of the weights: decay per step; null: no EMA"
    )
    warmup: bool = Field(True, description="EMA warmup, smaller decays at first: at most 1 - (1 + step) ** (-2 / 3)")


class Schedule(Section):
    """`schedule.*`: the learning rate schedule and warmup."""

    name: Annotated[str, _registered(SCHEDULES)] = Field(
        "cosine",
        description="learning rate schedule after warmup: `cosine`, `step`, `linear`, `one-cycle`, or a plugin's",
    )
    warmup_epochs: float = Field(0, ge=0, description="learning rate warmup: epochs of linear increase to the peak")
    milestones: tuple[float, ...] = Field(
        (30, 60), description="`step`: epochs at which the learning rate is multiplied by `gamma`"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="`step`: learning rate factor at each milestone")
    pct_start: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="`one-cycle`: fraction of the run in which the learning rate increases from peak / 25",
    )
    min_lr_ratio: Fraction = Field(
        0, description="learning rate at the end of the run as a fraction of the peak: `cosine`, `linear`, `one-cycle`"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Schedule":
        if list(self.milestones) != sorted(set(self.milestones)) or any(m <= 0 for m in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be positive and increasing")
        return self


class Engine(Section):
    """`engine.*`: DeepSpeed ZeRO, memory format, determinism, synchronized batch norm and torch.compile."""

    zero_stage: Literal[0, 1, 2, 3] | Auto = Field(
        "auto",
        description="DeepSpeed ZeRO stage, what is sharded over workers; auto: 0, or 1 with offload_optimizer",
    )
    channels_last: bool | Auto = Field(
        "auto",
        description="channels_last (NHWC) memory format; auto: on GPUs, where it is 1.7 times as fast",
    )
    deterministic: bool = Field(
        True,
        description="on GPUs: deterministic kernels only, for bitwise reproducible results and an exact resume",
    )
    tf32: bool = Field(True, description="on GPUs: TF32 for fp32 convolutions and matrix products")
    offload_optimizer: bool = Field(False, description="CPU offload: ZeRO 1-3 keep the optimizer state in CPU memory")
    sync_batch_norm: bool = Field(
        False, description="synchronized batch norm: batch statistics over all workers; GPUs only"
    )
    communication_data_type: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="dtype in which workers exchange gradients; auto: DeepSpeed's choice"
    )
    reduce_bucket_size: Count = Field(
        4_000_000,
        description="bucket size of gradient communication, which overlaps with the backward pass, in elements",
    )
    deepspeed: dict[str, Any] = Field(
        {},
        description="further keys of DeepSpeed's config; unknown keys, keys without effect or set by other keys "
        "are errors",
    )
    compile: Literal["off", "on", "try"] = Field(
        "off", description="torch.compile; `try` continues without it if it fails, with a warning"
    )


# A run resumes from a checkpoint only if these are unchanged, except those in `checkpoint.allow_changed`.
CheckpointIdentity = Literal[
    "model.name",
    "run.seed",
    "optim.name",
    "ema",
    "train.global_batch_size",
    "classes",
    "training images",
    "data",
]


class Checkpoint(Section):
    """`checkpoint.*`: checkpoint interval, storage and retention, and checks on resume."""

    every_epochs: Count = Field(1, description="checkpoint interval, epochs; the end of the run always writes one")
    every_samples: Count | None = Field(None, description="additional checkpoint interval, samples")
    every_minutes: float | None = Field(
        None, gt=0, description="additional checkpoint interval, minutes; checked at each log line"
    )
    storage: Annotated[Uri | None, Location("output")] = Field(
        None, description="path or URI (s3://...) for copies of checkpoints, for nodes whose disks are not shared"
    )
    keep_last: Count = Field(2, description="number of latest checkpoints kept, in addition to the best")
    keep_every_epochs: Count | None = Field(None, description="also keep the first checkpoint of every so many epochs")
    allow_changed: tuple[CheckpointIdentity, ...] = Field(
        (), description="resume although these differ from the checkpoint"
    )


class Elastic(Section):
    """Elastic training: as many workers as resources allow, `min` to `max`, in multiples of `step` (GPUs per node)."""

    min: Count
    max: Count
    step: Count = 1

    @model_validator(mode="after")
    def _ordered(self) -> "Elastic":
        if self.min > self.max:
            raise ValueError(f"min={self.min} must not exceed max={self.max}")
        if self.min % self.step or self.max % self.step:
            raise ValueError(f"min={self.min} and max={self.max} must be multiples of step={self.step}")
        return self


_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|(?<!PUBLIC_)KEY", re.IGNORECASE)


def _no_secrets(variables: dict[str, str]) -> dict[str, str]:
    wrong = [name for name in variables if _SECRET.search(name)]
    if wrong:
        raise ValueError(
            f"must not contain {wrong[0]}, since configs are saved and logged: set it in the environment of the nodes"
        )
    return variables


class Cluster(Section):
    """`cluster.*`: Ray workers, their resources, fault tolerance and elastic training."""

    workers: Count | Auto | Elastic = Field(
        "auto",
        description="auto: one worker per GPU, or one on the CPU; {min: M, max: N}: elastic, as many as "
        "resources allow",
    )
    cpus_per_worker: Count | Auto = Field(
        "auto", description="CPU cores per worker; auto: the machine's cores divided by its workers"
    )
    placement: Literal["pack", "spread"] = Field(
        "pack", description="placement group strategy: workers on few nodes (`pack`) or many (`spread`)"
    )
    accelerator_type: str | None = Field(None, description="GPU model by Ray's name, for example H100")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="custom Ray resources per worker")
    env: Annotated[dict[str, str], AfterValidator(_no_secrets)] = Field(
        {}, description="environment variables of the workers, for example {NCCL_SOCKET_IFNAME: eth0}"
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="fault tolerance: restarts after worker failures (lost or preempted nodes), from the latest "
        "checkpoint",
    )
    replacement_timeout_s: float = Field(
        1800, ge=10, description="seconds to wait for replacement resources after a worker failure"
    )
    resize_interval_s: float = Field(
        300,
        gt=0,
        description="elastic: seconds between checks for more resources; to grow, workers restart from the "
        "latest checkpoint",
    )
    hang_timeout_s: float = Field(
        1800,
        ge=60,
        description="hang detection: seconds without a batch until a worker's stacks are logged and it restarts",
    )
    dashboard_port: int | Auto | None = Field(
        None, description="port on loopback of an embedded Ray's dashboard; auto: any free port; null: no dashboard"
    )


class Tracking(Section):
    """`tracking.*`: MLflow tracking store, model registry, and behavior while they are unreachable."""

    uri: Annotated[Uri | None, Location("store")] = Field(
        None, description="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in `run.output`"
    )
    registry_uri: Annotated[Uri | None, Location("store")] = Field(
        None, description="MLflow model registry URI; default: MLFLOW_REGISTRY_URI, else the tracking store"
    )
    experiment: Annotated[str, _valid_by(experiment_name_error)] = Field(
        "densenet", description="MLflow experiment, created if missing"
    )
    registered_model_name: Annotated[str, _valid_by(model_name_error)] | None = Field(
        None, description="name of the registered model; default: `model.name`"
    )
    wait_timeout_s: float = Field(
        600,
        ge=0,
        description="seconds that the end of a run waits for an unreachable store, to send records and the model",
    )
    on_unreachable: Literal["fail", "spool"] = Field(
        "fail",
        description="if the store is unreachable at the start: `fail`, or `spool` the records to disk until it "
        "is reachable",
    )
    alias: Annotated[str, _valid_by(alias_error)] = Field(
        "candidate", description="alias of the new model version; MLflow reserves `latest` and `v` with a number"
    )
    custom: tuple[Annotated[str, _registered(TRACKERS)], ...] = Field(
        (), description="additional trackers of plugins by name; they receive the same records as MLflow"
    )


class RunConfig(Section):
    """The complete configuration of a training run."""

    run: Run = Run()
    device: Auto | Device = Field("auto", description="device: cpu or cuda; auto: CUDA if the workers have GPUs")
    model: Model = Model()
    finetune: Finetune = Finetune()
    data: Data = Data()
    augment: Augment = Augment()
    eval: Eval = Eval()
    train: Train = Train()
    loss: Loss = Loss()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        epochs, schedule, stage = self.train.epochs, self.schedule, self.engine.zero_stage
        if schedule.warmup_epochs >= epochs:
            raise ValueError(
                f"schedule.warmup_epochs={schedule.warmup_epochs:g} must be shorter than train.epochs={epochs:g}"
            )
        if schedule.name == "one-cycle" and schedule.warmup_epochs:
            raise ValueError("schedule.name=one-cycle has its own warmup: set schedule.warmup_epochs=0")
        if schedule.name == "step" and any(m >= epochs for m in schedule.milestones):
            raise ValueError(
                f"schedule.milestones={list(schedule.milestones)} must be less than train.epochs={epochs:g}: "
                f"set others, or schedule.milestones=[]"
            )
        if any(epoch >= epochs for epoch, _ in self.data.progressive_resize):
            raise ValueError(
                f"data.progressive_resize={[list(p) for p in self.data.progressive_resize]} must have epochs "
                f"less than train.epochs={epochs:g}"
            )
        if self.optim.needs_full_weights and stage not in (0, "auto"):
            raise ValueError(
                f"optim.name={self.optim.name} computes on whole weight tensors, which ZeRO stage {stage} shards: set "
                f"engine.zero_stage=0"
            )
        if self.train.precision == "fp16" and stage not in (0, "auto"):
            raise ValueError(
                f"train.precision=fp16 needs engine.zero_stage=0: at stage {stage} DeepSpeed skips all steps after an "
                f"overflow; or use bf16"
            )
        needs_stage_0 = self.optim.needs_full_weights or self.train.precision == "fp16"
        if self.engine.offload_optimizer and (stage == 0 or needs_stage_0):
            raise ValueError(
                "engine.offload_optimizer needs engine.zero_stage=1, 2 or 3, and an optim.name and train.precision "
                "that support it"
            )
        computes_stats = self.model.memory in ("shared-stats", "fused")
        if self.engine.sync_batch_norm and computes_stats:
            raise ValueError(
                f"engine.sync_batch_norm and model.memory={self.model.memory} both compute batch statistics: choose one"
            )
        if stage == 3 and (computes_stats or self.engine.compile != "off"):
            raise ValueError(
                "engine.zero_stage=3 gathers weights module by module: model.memory=shared-stats or fused, and "
                "engine.compile, need stage 0, 1 or 2"
            )
        return self

    def to_yaml(self) -> str:
        """Returns the config as YAML, from which `load_config` reads an equal config."""
        return yaml.dump(_without_interpolation(self.model_dump(mode="json")), Dumper=_Dumper, sort_keys=False)


def _without_interpolation(value: Any) -> Any:
    """Escapes `${` in all strings, which OmegaConf would read as an interpolation."""
    if isinstance(value, dict):
        return {key: _without_interpolation(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_interpolation(item) for item in value]
    return _INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value
