"""DeepSpeed's import, and what its own config model says of `engine.deepspeed`, known before any worker starts."""

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
from pipeline.train.deepspeed_keys import WHERE, unknown_key

_ONE = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), 1)
_ACCELERATOR = "DS_ACCELERATOR"
_WITHOUT_MODEL = {"aio", "flops_profiler", "timers", "torch_autocast"}  # sections that are read key by key


def import_deepspeed(device: str) -> Any:
    """DeepSpeed for an accelerator, without MLflow, which its autotuner would import for nothing, in seconds."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        with _accelerator(device):  # chosen on import
            import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    return deepspeed


def check_deepspeed(config: RunConfig, derived: Derived) -> dict[str, Any]:
    """What DeepSpeed will be told, after its own config model has read it; imports DeepSpeed only where it must.

    It needs neither a process group nor GPUs. Keys that the model does not read, at whatever depth, are refused, since
    they would have no effect.

    Raises:
        ConfigError: `engine.deepspeed` contradicts other keys, or has a key or value that DeepSpeed does not know.
    """
    told = deepspeed_config(config, derived)
    if not config.engine.deepspeed:
        return told
    deepspeed = import_deepspeed(derived.device)
    schema = deepspeed.runtime.config.DeepSpeedConfig
    recorded = _Recorded(told | _ONE)
    try:
        # The batch is one, because without a process group the model counts with one worker.
        schema(recorded)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, config.engine.deepspeed))) from error
    except Exception as error:  # assertions, type and value errors of all its sections
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{WHERE}={config.engine.deepspeed} is refused by DeepSpeed: {reason}") from error
    for section in _WITHOUT_MODEL & recorded.keys():
        for key in recorded[section].keys() - recorded[section].asked:
            raise ConfigError(unknown_key(f"{WHERE}.{section}", key, sorted(recorded[section].asked)))
    _check_kinds(config.engine.deepspeed, schema(dict(_ONE)))
    return told


def _check_kinds(further: dict[str, Any], default: Any) -> None:
    """Compares values with the defaults of the sections that have no Pydantic model, which take any value."""
    for section, defaults in (("flops_profiler", vars(default.flops_profiler_config)), ("aio", default.aio_config)):
        for key, value in further.get(section, {}).items():
            kind = type(defaults[key])
            if defaults[key] is not None and type(value) is not kind and not (kind is float and type(value) is int):
                raise ConfigError(f"{WHERE}.{section}.{key}={value!r} must be of the kind of {defaults[key]!r}.")


class _Recorded(dict[str, Any]):
    """A tree of sections that remembers which keys were asked for; its copies remember in the same set."""

    def __init__(self, tree: dict[str, Any]) -> None:
        super().__init__({k: _Recorded(v) if isinstance(v, dict) else v for k, v in tree.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def _problems(error: ValidationError, further: dict[str, Any]) -> list[str]:
    """One line per problem of a section, which Pydantic knows by the name of its class alone."""
    model = next(c for c in _subclasses(BaseModel) if c.__name__ == error.title)
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        where = ".".join((WHERE, *next((above for above in _sections(further) if _holds(further, above + path)), [])))
        where = ".".join((where, *path[:-1]))
        if problem["type"] == "extra_forbidden":
            lines.append(unknown_key(where, path[-1], _known(model, path[:-1])))
        else:
            message = problem["msg"].replace("Input should be", "must be")
            lines.append(f"{where}{'.' if path else ''}{''.join(path[-1:])}={problem['input']!r}: {message}")
    return lines


def _holds(tree: Any, path: list[str]) -> bool:
    for part in path:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _sections(tree: Any) -> Iterator[list[str]]:
    """The path of each section below."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield [key]
            yield from ([key, *below] for below in _sections(value))


def _known(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of a section's model, or of one below it; a field with an alias goes by both names."""
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
    """Names the accelerator to DeepSpeed, whatever the shell says, and leaves the environment as it was."""
    before = os.environ.get(_ACCELERATOR)
    os.environ[_ACCELERATOR] = device
    try:
        yield
    finally:
        del os.environ[_ACCELERATOR]
        if before is not None:
            os.environ[_ACCELERATOR] = before
