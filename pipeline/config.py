"""The run's configuration: its schema and its checks.

`pipeline/config_file.py` reads one from YAML.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import fsspec
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.choices import Choices
from pipeline.extension_points import AUGMENTATIONS, DATA_SOURCES, OPTIMIZERS, SCHEDULES, TRACKERS, is_generated
from pipeline.names import alias_error, experiment_error, model_name_error
from pipeline.plugins import import_plugins, is_file

MAX_PIXELS = 178_956_970  # of an image where nothing else is said: PIL's own limit

Auto = Literal["auto"]
Device = Literal["cpu", "cuda"]
Interpolation = Literal["bilinear", "bicubic"]
Memory = Literal["none", "activation-checkpointing", "shared-stats"]
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
        raise ValueError("must not hold a password, since configs are saved and shown: use environment variables")
    return uri


def _check_scheme(root: str) -> None:
    """Raises `ValueError` with the nearest where no data source or file system answers to an address."""
    scheme, known = root.partition("://")[0].rpartition("::")[2], [*DATA_SOURCES, *fsspec.available_protocols()]
    if scheme not in known:
        near = difflib.get_close_matches(scheme, known, n=1)
        hint = f"did you mean '{near[0]}://'?" if near else f"plugins add more to {', '.join(DATA_SOURCES)}"
        raise ValueError(f"root={root}: there is no data source and no file system of that name; {hint}")


def _without(problem: Callable[[str], str | None]) -> AfterValidator:
    """A check that refuses a name of which `problem` says what is wrong with it."""

    def check(name: str) -> str:
        wrong = problem(name)
        if wrong is not None:
            raise ValueError(wrong)
        return name

    return AfterValidator(check)


def _one_of(choices: Choices[Any]) -> AfterValidator:
    return AfterValidator(choices.check)


Name = Annotated[str, AfterValidator(_plain_name)]
Address = Annotated[str, AfterValidator(_no_password)]


@dataclass(frozen=True)
class Location:
    """Marks a key whose value is a path or an address, by what it is to a run; see `pipeline.locations`.

    `input` and `output` must be the same for all nodes, `local` is on each node's own disk, `store` is one of MLflow's.
    Values for which `holds` is false are no places.
    """

    kind: Literal["input", "output", "local", "store"]
    holds: Callable[[str], bool] = lambda value: True


_FastDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C where PyYAML was built with it: ten times as fast


class _Dumper(_FastDumper):  # type: ignore[misc, valid-type]
    """Quotes text that OmegaConf would read as a number and PyYAML would not: `1e5`."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _imported(plugins: tuple[str, ...]) -> tuple[str, ...]:
    """Imports them before anything else is looked at: `run` is the first section."""
    import_plugins(plugins)
    return plugins


class Section(BaseModel):
    """A part of the config: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Run(Section):
    """`run.*`: name, place and seed of a run."""

    name: Name | None = Field(None, description="run folder under `output`; default: CONFIG-YYYYmmdd-HHMMSS-XXXXXX")
    output: Annotated[str, Location("output")] = Field(
        "outputs", description="folder for runs, the data index and the default tracking store"
    )
    seed: int = Field(0, ge=0, lt=2**64, description="fixes the weights, the sample order and every augmentation")
    plugins: Annotated[tuple[str, ...], AfterValidator(_imported), Location("input", is_file)] = Field(
        (), description="modules, or .py files, that register optimizers, models, ... of your own (docs/extending.md)"
    )

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """In another process, too, what a config names must be there."""
        super().__setstate__(state)
        import_plugins(self.plugins)


class Model(Section):
    """`model.*`: the model, and what it starts from."""

    name: str = Field("densenet121", description="a DenseNet, or any other image classifier in timm's registry")
    num_classes: Count | None = Field(None, description="logits; default: the classes of the data")
    in_chans: Literal[1, 3] = Field(3, description="3: RGB, 1: gray (ITU-R BT.601 luma)")
    global_pool: Literal["avg", "max", "avgmax", "catavgmax"] = Field(
        "avg", description="pooling before the classifier; avg: the model's own"
    )
    drop_rate: float = Field(0, ge=0, lt=1, description="dropout before the classifier")
    layer_drop_rate: float = Field(0, ge=0, lt=1, description="dropout after each dense layer, of DenseNets")
    memory: Memory = Field(
        "none", description="what the backward pass of DenseNets computes anew instead of keeping it"
    )
    weights: Annotated[str | None, Location("input")] = Field(
        None, description="start from a .safetensors or .pth file, a checkpoint or run folder, or models:/NAME@ALIAS"
    )


class Finetune(Section):
    """`finetune.*`: which layers learn, and how fast."""

    freeze_blocks: int = Field(
        0, ge=0, le=4, description="1: the stem and the first dense block stay as they are; ... (DenseNets)"
    )
    freeze_batch_norm: bool = Field(False, description="all norms use their running statistics and stay as they are")
    layer_decay: float = Field(
        1, gt=0, le=1, description="rate's factor for each dense block, or stage, further from the head"
    )
    head_lr_mult: float = Field(1, gt=0, description="rate's factor for the classifier")


class Data(Section):
    """`data.*`: the data set, and how its images are read and cut."""

    root: Annotated[Address | None, Location("input")] = Field(
        None,
        description="a prepared data set's folder or address (s3://...), or a folder with class folders in each split",
    )
    train: Name = Field("train", description="name of the training split")
    val: Name = Field("val", description="name of the evaluation split")
    license: str | None = Field(None, description="license of the data, told with the registered model")
    stage: Annotated[str | None, Location("local")] = Field(
        None, description="folder on each node's own disk, to which shards are copied first"
    )
    on_corrupt: Literal["error", "skip"] = Field("error", description="corrupt training images: end, or replace them")
    max_pixels: Count = Field(MAX_PIXELS, description="images of more pixels are refused; the model's card keeps it")
    shuffle: Literal["full", "windowed"] = Field("full", description="`windowed`: within windows of shards")
    window: Count = Field(16, description="shards in a window of the windowed shuffle")
    image_size: int = Field(224, ge=8, le=1024, description="training image side, pixels")
    progressive_resize: tuple[tuple[float, int], ...] = Field(
        (), description="[epoch, side] pairs: images of that side until that epoch, `image_size` afterwards"
    )
    scale: tuple[float, float] = Field((0.08, 1.0), description="random crop's share of the image's area")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="random crop's width / height")
    hflip: Fraction = Field(0.5, description="probability of a horizontal flip")
    mean: Rgb = Field((0.485, 0.456, 0.406), description="per channel, of pixel values in [0, 1]")
    std: Rgb = Field((0.229, 0.224, 0.225), description="per channel, of pixel values in [0, 1]")
    interpolation: Interpolation = Field("bilinear", description="filter of the resize, always antialiased")
    threads: Count | Auto = Field("auto", description="DALI threads per worker; auto: the worker's CPU cores")
    readers: int = Field(
        4, ge=0, le=256, description="threads per worker that read files ahead; 0: the planning one does"
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
                raise ValueError(f"root={self.root} is an address: set stage to a folder on each node's own disk")
        epochs = [epoch for epoch, _ in self.progressive_resize]
        if (
            epochs != sorted(set(epochs))
            or any(e <= 0 for e in epochs)
            or any(s < 8 for _, s in self.progressive_resize)
        ):
            pairs = [list(pair) for pair in self.progressive_resize]
            raise ValueError(
                f"progressive_resize={pairs} must be [epoch, side] pairs with rising epochs and sides from 8"
            )
        return self

    @property
    def largest_side(self) -> int:
        """The largest training image's side, pixels."""
        return max(self.image_size, *(side for _, side in self.progressive_resize), 0)

    def side_at(self, epoch: float) -> int:
        """The training image's side, pixels, at a point of the run."""
        return next((side for until, side in self.progressive_resize if epoch < until), self.image_size)


class Augment(Section):
    """`augment.*`: what is done to a training image besides crop and flip."""

    brightness: Fraction = Field(0, description="factor uniform in 1 +- this, on top of crop and flip")
    contrast: Fraction = Field(0, description="factor uniform in 1 +- this")
    saturation: Fraction = Field(0, description="factor uniform in 1 +- this")
    lighting: float = Field(0, ge=0, description="standard deviation of AlexNet's PCA lighting; the paper's is 0.1")
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = Field(
        "none", description="DALI's suites of operators"
    )
    randaugment_num_ops: int = Field(2, ge=1, le=8, description="operators one after another in `randaugment`")
    randaugment_magnitude: int = Field(9, ge=0, le=30, description="strength of each in `randaugment`, 0 to 30")
    erase_prob: Fraction = Field(0, description="probability of erasing a box")
    erase_scale: tuple[float, float] = Field((0.02, 1 / 3), description="box's share of the image's area")
    erase_ratio: tuple[float, float] = Field((0.3, 3.3), description="box's height / width")
    erase_fill: Literal["mean", "noise"] = Field("mean", description="what the box is filled with")
    mixup_alpha: float = Field(0, ge=0, description="alpha of the Beta distribution of the shares; 0: no mixup")
    cutmix_alpha: float = Field(0, ge=0, description="alpha of the Beta distribution of the shares; 0: no CutMix")
    mix_prob: Fraction = Field(1, description="share of the pairs of images that are mixed")
    mix_switch_prob: Fraction = Field(0.5, description="share of CutMix where mixup is on too")
    custom: tuple[Annotated[str, _one_of(AUGMENTATIONS)], ...] = Field(
        (), description="augmentations of plugins, by name, one after another before images are mixed"
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
    def colors(self) -> bool:
        """Whether images' colors are changed."""
        return bool(self.brightness or self.contrast or self.saturation or self.lighting)

    @property
    def auto_augment_stages(self) -> int:
        """Operators of `auto` that come one after another; 0 where it is off."""
        return {"none": 0, "randaugment": self.randaugment_num_ops, "trivialaugment": 1}[self.auto_augment]

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other, in pairs."""
        return bool(self.mixup_alpha or self.cutmix_alpha)


_EVAL_PRESETS: dict[str, tuple[float, Interpolation]] = {  # crop / resize, filter
    "torchvision": (224 / 256, "bilinear"),  # torchvision.transforms._presets.ImageClassification's defaults
    "timm": (0.875, "bicubic"),  # timm.data.constants: DEFAULT_CROP_PCT and its models' usual filter
}


def describe_transform(resize: int, interpolation: Interpolation, crop: int) -> str:
    """An evaluation transform in one line, to stand beside every accuracy."""
    return f"resize {resize} {interpolation} antialias, center crop {crop}, no EXIF rotation"


class Eval(Section):
    """`eval.*`: when and with which transform accuracy is counted."""

    transform: Literal["torchvision", "timm"] = Field(
        "torchvision", description="whose sizes and filter are the defaults of the next keys"
    )
    crop: int = Field(224, ge=8, le=1024, description="center crop's side, pixels")
    resize: int = Field(256, ge=8, le=2048, description="shorter side after the resize, pixels; default: crop / 0.875")
    interpolation: Interpolation = Field(
        "bilinear", description="filter of the resize, always antialiased; default: bilinear, bicubic for `timm`"
    )
    batch_size: Count | Auto = Field("auto", description="images per worker and batch; auto: as in training")
    every_epochs: Count = Field(1, description="epochs between evaluations; the end of the run is always evaluated")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """Fills in what the transform's preset says, so that a saved config holds the numbers."""
        presets = list(_EVAL_PRESETS)  # what is given may be of any type, and have no hash
        if not isinstance(given, dict) or given.get("transform", "torchvision") not in presets:
            return given
        share, interpolation = _EVAL_PRESETS[given.get("transform", "torchvision")]
        crop = given.get("crop", 224)
        filled: dict[str, Any] = {"interpolation": interpolation}
        if isinstance(crop, int):
            filled["resize"] = int(crop / share)
        return filled | given

    @model_validator(mode="after")
    def _crop_fits(self) -> "Eval":
        if self.crop > self.resize:
            raise ValueError(f"crop={self.crop} must not exceed resize={self.resize}")
        return self

    @property
    def description(self) -> str:
        """The transform in one line, to stand beside every accuracy."""
        return describe_transform(self.resize, self.interpolation, self.crop)


class Train(Section):
    """`train.*`: length, batch, precision, and what happens where it goes wrong."""

    epochs: float = Field(90, gt=0, description="passes over the training split; fractions are allowed")
    global_batch_size: Count = Field(256, description="images per optimizer step over all workers")
    max_device_batch_size: Count = Field(64, description="most images that one device holds at once")
    precision: Auto | Precision = Field(
        "auto", description="auto: bf16 on CUDA, fp32 on the CPU; fp16 (with loss scaling) needs ZeRO stage 0"
    )
    log_every_steps: Count = Field(10, description="optimizer steps between log lines")
    on_nan: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="a loss that is NaN or infinite: end, leave the step out, or go back to the newest checkpoint",
    )
    nan_limit: Count = Field(10, description="steps left out, or returns, after which the run ends all the same")
    on_out_of_memory: Literal["stop", "halve"] = Field(
        "stop", description="`halve`: try device batches before training, each half of the one before, until one fits"
    )
    profile_steps: tuple[Count, Count] | None = Field(
        None, description="[first, last] step to profile on rank 0, into the run's folder and artifacts"
    )

    @model_validator(mode="after")
    def _profile(self) -> "Train":
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)} must be [first, last] with first <= last")
        return self


class Optim(Section):
    """`optim.*`: the optimizer and its peak rate."""

    name: Annotated[str, _one_of(OPTIMIZERS)] = Field(
        "sgd", description="or `adamw`, `lamb`, `lars`, `muon` (these three need ZeRO stage 0), or a plugin's"
    )
    lr: float = Field(0.1, gt=0, description="peak learning rate, before `lr_scaling`")
    lr_scaling: Literal["none", "linear", "sqrt"] = Field(
        "none", description="factor: the global batch over `lr_base_batch`, or its square root"
    )
    lr_base_batch: Count = Field(256, description="the global batch that `lr` is meant for, where it is scaled")
    momentum: float = Field(0.9, ge=0, lt=1, description="of `sgd`, `lars` and `muon`")
    nesterov: bool = Field(True, description="Nesterov's look-ahead in these; without effect at momentum 0")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="of `adamw`, `lamb` and `muon`, each below 1")
    eps: float = Field(1e-8, gt=0, description="of `adamw`, `lamb` and `muon`")
    weight_decay: float = Field(1e-4, ge=0, description="on convolution and linear weights only")
    clip_grad_norm: float | None = Field(None, gt=0, description="largest global gradient norm; null: no clipping")

    @model_validator(mode="after")
    def _below_one(self) -> "Optim":
        if max(self.betas) >= 1:
            raise ValueError(f"betas={list(self.betas)} must each be below 1")
        return self

    @property
    def whole_weights(self) -> bool:
        """Whether the optimizer looks at whole weights, which ZeRO 1-3 cut up."""
        return OPTIMIZERS[self.name].whole_weights

    def peak_lr(self, global_batch_size: int) -> float:
        """The rate after scaling: linear (Goyal et al. 2017, arXiv 1706.02677) or by the square root."""
        power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[self.lr_scaling]
        return self.lr * (global_batch_size / self.lr_base_batch) ** power


class Loss(Section):
    """`loss.*`: the loss, and a teacher's share in it."""

    name: Literal["cross-entropy", "bce"] = Field("cross-entropy", description="`bce`: binary, mean over the classes")
    label_smoothing: float = Field(0, ge=0, lt=1, description="share of the target that goes to all classes alike")
    teacher: Annotated[str | None, Location("input")] = Field(
        None, description="model to learn from: models:/NAME@ALIAS, or a checkpoint or run folder of this project"
    )
    distillation_alpha: Fraction = Field(0.5, description="weight of the teacher's answers; the labels' is 1 - alpha")
    distillation_temperature: float = Field(
        1, gt=0, description="by which both logits are divided for the teacher's part"
    )


class Ema(Section):
    """`ema.*`: the moving average of the weights."""

    decay: float | None = Field(None, ge=0, lt=1, description="of the average of the weights per step; null: none")
    warmup: bool = Field(True, description="smaller decays at first: 1 - (1 + step) ** (-2 / 3)")


class Schedule(Section):
    """`schedule.*`: the learning rate over the run."""

    name: Annotated[str, _one_of(SCHEDULES)] = Field(
        "cosine", description="what follows the warm-up; or `step`, `linear`, `one-cycle`, or a plugin's"
    )
    warmup_epochs: float = Field(0, ge=0, description="linear rise to the peak rate")
    milestones: tuple[float, ...] = Field((30, 60), description="epochs at which `step` multiplies the rate by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone")
    pct_start: float = Field(0.3, gt=0, lt=1, description="share of the run in which `one-cycle` rises from peak / 25")
    min_lr_ratio: Fraction = Field(
        0, description="rate at the end as a share of the peak: `cosine`, `linear`, `one-cycle`"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Schedule":
        if list(self.milestones) != sorted(set(self.milestones)) or any(m <= 0 for m in self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be positive and rising")
        return self


class Engine(Section):
    """`engine.*`: DeepSpeed's ZeRO, and compilation."""

    zero_stage: Literal[0, 1, 2, 3] | Auto = Field(
        "auto",
        description="DeepSpeed ZeRO, what is sharded over workers; auto: 0, or 1 with offload_optimizer",
    )
    channels_last: bool | Auto = Field(
        "auto", description="images and features in NHWC memory order; auto: on GPUs, where it is 1.7 times as fast"
    )
    deterministic: bool = Field(
        True,
        description="on GPUs: only kernels that repeat their results bit for bit, so that resume is exact there too",
    )
    tf32: bool = Field(True, description="on GPUs: fp32 convolutions and matrix products may round inputs to TF32")
    offload_optimizer: bool = Field(False, description="ZeRO 1-3 keep the optimizer's state in the CPU's memory")
    sync_batch_norm: bool = Field(False, description="batch statistics over all workers; on GPUs alone")
    communication_data_type: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="number format of gradients between workers; auto: DeepSpeed's choice"
    )
    reduce_bucket_size: Count = Field(500_000_000, description="most gradients, by count, in one message of ZeRO 1-3")
    deepspeed: dict[str, Any] = Field(
        {},
        description="further keys of DeepSpeed's own config; those that follow from other keys, have no effect or are "
        "unknown to it are refused",
    )
    compile: Literal["off", "on", "try"] = Field(
        "off", description="torch.compile; `try` goes on without it where it fails, with a warning"
    )


# What must be the same for a checkpoint to be continued, unless it is named in `checkpoint.allow_changed`.
Identity = Literal[
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
    """`checkpoint.*`: when checkpoints are written, where, and which are kept."""

    every_epochs: Count = Field(1, description="epochs between checkpoints; the end of the run always has one")
    every_samples: Count | None = Field(None, description="samples between further checkpoints")
    every_minutes: float | None = Field(None, gt=0, description="minutes between further ones, looked at when logging")
    storage: Annotated[Address | None, Location("output")] = Field(
        None, description="folder or address (s3://...) that keeps copies, for nodes whose own disks are not shared"
    )
    keep_last: Count = Field(2, description="newest checkpoints kept; the best one is kept besides")
    keep_every_epochs: Count | None = Field(None, description="the first one in every so many epochs is kept too")
    allow_changed: tuple[Identity, ...] = Field(
        (), description="differences from the run's checkpoint that are accepted"
    )


class Elastic(Section):
    """As many workers as there is room for, within bounds; they come `step` at a time, as the GPUs of a node do."""

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
            f"must not hold {wrong[0]}, since configs are saved and shown: set it in the environment of the nodes"
        )
    return variables


class Cluster(Section):
    """`cluster.*`: workers, their resources, and how many failures are borne."""

    workers: Count | Auto | Elastic = Field(
        "auto", description="auto: one per GPU, or one on the CPU; {min: M, max: N}: as many as there is room for"
    )
    cpus_per_worker: Count | Auto = Field("auto", description="auto: the machine's cores shared out")
    placement: Literal["pack", "spread"] = Field("pack", description="workers on few nodes, or on many")
    accelerator_type: str | None = Field(None, description="GPU model by Ray's name, for example H100")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="further Ray resources per worker")
    env: Annotated[dict[str, str], AfterValidator(_no_secrets)] = Field(
        {}, description="environment variables of the workers, for example {NCCL_SOCKET_IFNAME: eth0}"
    )
    max_failures: int = Field(3, ge=0, description="restarts after a lost worker, from the newest checkpoint")
    replacement_timeout_s: float = Field(
        1800, ge=10, description="how long a run that lost workers waits for room to start again"
    )
    resize_interval_s: float = Field(
        300,
        gt=0,
        description="how often elastic workers look for more room; they start again from the newest checkpoint",
    )
    hang_timeout_s: float = Field(
        1800, ge=60, description="a worker without a batch for so long is ended, all stacks in its log, and restarted"
    )
    dashboard_port: int | Auto = Field("auto", description="of an embedded Ray, on loopback; auto: any free port")


class Tracking(Section):
    """`tracking.*`: MLflow's store, the registry, and what happens without them."""

    uri: Annotated[Address | None, Location("store")] = Field(
        None, description="default: MLFLOW_TRACKING_URI, else SQLite in `run.output`"
    )
    registry_uri: Annotated[Address | None, Location("store")] = Field(
        None, description="where models are registered; default: MLFLOW_REGISTRY_URI, else the tracking store"
    )
    experiment: Annotated[str, _without(experiment_error)] = Field(
        "densenet", description="MLflow experiment, made if missing"
    )
    registered_model_name: Annotated[str, _without(model_name_error)] | None = Field(
        None, description="registered model name; default: the model's name"
    )
    wait_timeout_s: float = Field(
        600, ge=0, description="how long the end of a run waits for a store that is away, to send records and the model"
    )
    on_unreachable: Literal["fail", "spool"] = Field(
        "fail", description="a store that is away at the start: end, or keep the records on disk until it is there"
    )
    alias: Annotated[str, _without(alias_error)] = Field(
        "candidate", description="moved to the new version; `latest` and `v` with a number are MLflow's own"
    )
    custom: tuple[Annotated[str, _one_of(TRACKERS)], ...] = Field(
        (), description="trackers of plugins, by name, that get the records that MLflow gets"
    )


class RunConfig(Section):
    """Everything that a user chooses about one training run."""

    run: Run = Run()
    device: Auto | Device = Field("auto", description="auto: CUDA where the workers have GPUs")
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
    def _fits_together(self) -> "RunConfig":
        epochs, schedule, stage = self.train.epochs, self.schedule, self.engine.zero_stage
        if schedule.warmup_epochs >= epochs:
            raise ValueError(
                f"schedule.warmup_epochs={schedule.warmup_epochs:g} must be shorter than train.epochs={epochs:g}"
            )
        if schedule.name == "one-cycle" and schedule.warmup_epochs:
            raise ValueError("schedule.name=one-cycle rises by itself: set schedule.warmup_epochs=0")
        if schedule.name == "step" and any(m >= epochs for m in schedule.milestones):
            raise ValueError(
                f"schedule.milestones={list(schedule.milestones)} must lie before train.epochs={epochs:g}, where the "
                f"run ends: set others, or schedule.milestones=[]"
            )
        if any(epoch >= epochs for epoch, _ in self.data.progressive_resize):
            raise ValueError(
                f"data.progressive_resize={[list(p) for p in self.data.progressive_resize]} must lie before train.epochs={epochs:g}"
            )
        if self.optim.whole_weights and stage not in (0, "auto"):
            raise ValueError(
                f"optim.name={self.optim.name} works on whole weights, which ZeRO stage {stage} cuts up: set "
                f"engine.zero_stage=0"
            )
        if self.train.precision == "fp16" and stage not in (0, "auto"):
            raise ValueError(
                f"train.precision=fp16 needs engine.zero_stage=0: at stage {stage} DeepSpeed skips all steps after one "
                f"that overflowed; or use bf16"
            )
        whole = self.optim.whole_weights or self.train.precision == "fp16"
        if self.engine.offload_optimizer and (stage == 0 or whole):
            raise ValueError(
                "engine.offload_optimizer needs engine.zero_stage=1, 2 or 3, and so an optimizer and a precision that "
                "can do with them"
            )
        if self.engine.sync_batch_norm and self.model.memory == "shared-stats":
            raise ValueError(
                "engine.sync_batch_norm and model.memory=shared-stats both compute batch statistics: choose one"
            )
        if stage == 3 and (self.model.memory == "shared-stats" or self.engine.compile != "off"):
            raise ValueError(
                "engine.zero_stage=3 gathers weights module by module: model.memory=shared-stats and engine.compile "
                "need stage 0, 1 or 2"
            )
        return self

    def to_yaml(self) -> str:
        """The whole config as YAML that `load_config` reads back to an equal object."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
