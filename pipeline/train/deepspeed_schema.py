"""Imports DeepSpeed, and validates `engine.deepspeed` with DeepSpeed's own config model before any worker starts."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config import RunConfig
from pipeline.derived import Derived
from pipeline.errors import ConfigError
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.train.deepspeed_keys import SECTION, unknown_key

_BATCH_OF_ONE = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), 1)
_ACCELERATOR = "DS_ACCELERATOR"
_SECTIONS_WITHOUT_MODEL = {
    "aio",
    "flops_profiler",
    "timers",
    "torch_autocast",
}  # sections without a Pydantic model; DeepSpeed reads their keys one by one


def import_deepspeed(device: str) -> Any:
    """Imports DeepSpeed for an accelerator, without MLflow, whose import by the autotuner takes seconds."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        with _accelerator(device):  # DeepSpeed chooses the accelerator on import
            import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    return deepspeed


def check_deepspeed(config: RunConfig, derived: Derived) -> dict[str, Any]:
    """Returns DeepSpeed's config, validated by DeepSpeed's own config model where `engine.deepspeed` has keys.

    Needs neither a process group nor GPUs, and imports DeepSpeed only where there is something to validate. Refuses
    keys that DeepSpeed does not read, at any depth, since they would have no effect.

    Raises:
        ConfigError: `engine.deepspeed` contradicts other keys, or has a key or value that DeepSpeed does not know.
    """
    settings = deepspeed_config(config, derived)
    if not config.engine.deepspeed:
        return settings
    deepspeed = import_deepspeed(derived.device)
    schema = deepspeed.runtime.config.DeepSpeedConfig
    recorded = _KeyRecorder(settings | _BATCH_OF_ONE)
    try:
        # Batch size 1, because the model assumes one worker without a process group.
        schema(recorded)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, config.engine.deepspeed))) from error
    except Exception as error:  # its sections raise assertion, type and value errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{SECTION}={config.engine.deepspeed} is refused by DeepSpeed: {reason}") from error
    for section in _SECTIONS_WITHOUT_MODEL & recorded.keys():
        for key in recorded[section].keys() - recorded[section].read_keys:
            raise ConfigError(unknown_key(f"{SECTION}.{section}", key, sorted(recorded[section].read_keys)))
    _check_types(config.engine.deepspeed, schema(dict(_BATCH_OF_ONE)))
    return settings


def _check_types(further: dict[str, Any], default: Any) -> None:
    """Compares value types with the defaults, in sections without a Pydantic model, which accept any value."""
    for section, defaults in (("flops_profiler", vars(default.flops_profiler_config)), ("aio", default.aio_config)):
        for key, value in further.get(section, {}).items():
            expected = type(defaults[key])
            if defaults[key] is None or type(value) is expected or (expected is float and type(value) is int):
                continue
            raise ConfigError(
                f"{SECTION}.{section}.{key}={value!r} must have type {expected.__name__}, like the default "
                f"{defaults[key]!r}."
            )


class _KeyRecorder(dict[str, Any]):
    """A nested dict that records which keys were read; its copies record into the same set."""

    def __init__(self, tree: dict[str, Any]) -> None:
        super().__init__({k: _KeyRecorder(v) if isinstance(v, dict) else v for k, v in tree.items()})
        self.read_keys: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read_keys.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read_keys.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read_keys.add(str(key))
        return super().__contains__(key)


def _problems(error: ValidationError, further: dict[str, Any]) -> list[str]:
    """Returns one line per validation error; Pydantic names the section only by its model's class."""
    model = next(c for c in _subclasses(BaseModel) if c.__name__ == error.title)
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        section = next((parent for parent in _sections(further) if _contains(further, parent + path)), [])
        where = ".".join((SECTION, *section, *path[:-1]))
        if problem["type"] == "extra_forbidden":
            lines.append(unknown_key(where, path[-1], _known(model, path[:-1])))
        else:
            message = problem["msg"].replace("Input should be", "must be")
            lines.append(f"{where}{'.' if path else ''}{''.join(path[-1:])}={problem['input']!r}: {message}")
    return lines


def _contains(tree: Any, path: list[str]) -> bool:
    for part in path:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _sections(tree: Any) -> Iterator[list[str]]:
    """Yields the path of each nested section."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield [key]
            yield from ([key, *below] for below in _sections(value))


def _known(model: type[BaseModel], path: list[str]) -> list[str]:
    """Returns the field names and aliases of a section's model, or of a nested section's."""
    for part in path:
        fields = {name: f for n, f in model.model_fields.items() for name in (n, f.alias)}
        kinds = [fields[part].annotation, *getattr(fields[part].annotation, "__args__", ())]
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return [name for n, f in model.model_fields.items() for name in (n, f.alias) if name is not None]


def _subclasses(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


@contextmanager
def _accelerator(device: str) -> Iterator[None]:
    """Sets DeepSpeed's accelerator variable, whatever the shell's value, and restores it afterwards."""
    before = os.environ.get(_ACCELERATOR)
    os.environ[_ACCELERATOR] = device
    try:
        yield
    finally:
        del os.environ[_ACCELERATOR]
        if before is not None:
            os.environ[_ACCELERATOR] = before
