"""The configuration schema of a run, and its validation. `pipeline/config_file.py` loads it from YAML."""

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from pipeline.config_data import Augment, Data, Eval
from pipeline.config_fields import Auto, Count, Device, Location, MemoryMode, Name, Section, Uri, registered, valid_by
from pipeline.config_train import Ema, Loss, Optim, Schedule, Train
from pipeline.extension_points import TRACKERS
from pipeline.mlflow_names import alias_error, experiment_name_error, model_name_error
from pipeline.plugins import import_plugins, is_file

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
    "sample order",
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
    experiment: Annotated[str, valid_by(experiment_name_error)] = Field(
        "densenet", description="MLflow experiment, created if missing"
    )
    registered_model_name: Annotated[str, valid_by(model_name_error)] | None = Field(
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
    alias: Annotated[str, valid_by(alias_error)] = Field(
        "candidate", description="alias of the new model version; MLflow reserves `latest` and `v` with a number"
    )
    custom: tuple[Annotated[str, registered(TRACKERS)], ...] = Field(
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
