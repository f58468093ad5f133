"""Loads a config from YAML with includes and overrides, explains what is invalid, and documents all keys.

The file's own keys override those of `include: FILE` (or a list of files, relative to the including file), `key=value`
overrides both, and the result is validated into one frozen `RunConfig`. An override's value is parsed as YAML, except
for keys of type string, which take it literally: `run.name=007`, `data.root=a #1`.
"""

import difflib
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipeline.config import RunConfig
from pipeline.config_fields import Section
from pipeline.errors import ConfigError

BUILT_IN = Path(__file__).parent / "configs"


def built_in_configs() -> dict[str, Path]:
    """Returns the configs in the package by name: the experiments, then the recipes that they include."""
    files = [*sorted(BUILT_IN.glob("*.yaml")), *sorted(BUILT_IN.glob("recipes/*.yaml"))]
    return {file.relative_to(BUILT_IN).with_suffix("").as_posix(): file for file in files}


def find_config(name: str | Path) -> Path:
    """Returns the config file for a path or the name of a built-in config, such as `densenet121`.

    Raises:
        ConfigError: it is neither a file nor the name of a built-in config.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = built_in_configs()
    if path.as_posix() not in known:
        near = difflib.get_close_matches(path.as_posix(), known, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"config '{name}' is neither a file nor built in.{hint} Built in: {', '.join(known)}.")
    return known[path.as_posix()]


def included_files(path: Path) -> list[Path]:
    """Returns the absolute paths of a config file and all files that it includes, each once.

    Raises:
        ConfigError: one of them is missing or is not YAML.
    """
    files: list[Path] = []
    _load_file(path, seen=(), files=files)
    return list(dict.fromkeys(files))


def load_config(source: str | Path | dict[str, Any], *overrides: str) -> RunConfig:
    """Reads a config with its includes, applies `key=value` overrides and validates the result.

    Args:
        source: A YAML file; the name of a built-in config, such as `demo` or `densenet121`; or nested dictionaries,
            whose `include` names built-in configs or files.
        overrides: `key=value`, as on the command line, for example `train.epochs=3`.

    Raises:
        ConfigError: a file is missing or is not YAML, a key is unknown, or a value is out of range or required and
            missing (`???`); the message lists all problems.
    """
    path = "the config" if isinstance(source, dict) else source
    merged = _load_dict(source) if isinstance(source, dict) else _load_file(find_config(source), seen=(), files=[])
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override '{override}' is not of the form key=value, for example train.epochs=10.")
        try:
            merged = cast(DictConfig, OmegaConf.merge(merged, OmegaConf.from_dotlist([_as_yaml(override)])))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override '{override}' cannot be applied: {_first_line(error)}.") from error
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{path} requires {' and '.join(missing)}: add {missing[0]}=VALUE to the command.")
        return RunConfig.model_validate(OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}.") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is not a valid config:\n" + "\n".join(_problem_lines(error))) from error


def _as_yaml(override: str) -> str:
    """Quotes the value of an override whose key has type string: as YAML, `007` is 7, and ` #1` is a comment."""
    key, _, text = override.partition("=")
    text = text.strip()
    if text in ("", "null", "~") or text[0] in "'\"" or not _is_string(key.strip()):
        return override
    return f"{key}={json.dumps(text, ensure_ascii=False)}"


def _is_string(key: str) -> bool:
    types: list[Any] = [RunConfig]
    for part in key.split("."):
        types = [inner for outer in types for inner in _field_types(outer, part)]
    return str in types and set(types) <= {str, NoneType}


def _field_types(kind: Any, part: str) -> list[Any]:
    """Returns the allowed types of a key in a section or a dictionary."""
    if get_origin(kind) is dict:
        return _union_members(get_args(kind)[1])
    if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
        return _union_members(kind.model_fields[part].annotation)
    return []


def _union_members(kind: Any) -> list[Any]:
    """Returns the types of a union, without annotations."""
    if get_origin(kind) is Annotated:
        return _union_members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for part in get_args(kind) for member in _union_members(part)]
    return [kind]


def _load_file(path: Path, seen: tuple[Path, ...], files: list[Path]) -> DictConfig:
    """Merges a file over its includes and appends all paths to `files`; `seen` detects cycles."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"config files include each other: {' -> '.join(p.name for p in (*seen, path))}.")
    if not path.is_file():
        origin = f" (included by {seen[-1]})" if seen else ""
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=3)
        raise ConfigError(
            f"config file {path}{origin} does not exist." + (f" Similar: {', '.join(near)}." if near else "")
        )
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} must contain `key: value` lines at its top level.")
    files.append(path)
    includes = content.pop("include", [])
    if isinstance(includes, str):
        includes = [includes]
    parts = [_load_file(path.parent / include, (*seen, path), files) for include in includes]
    return cast(DictConfig, OmegaConf.merge(*parts, content))


def _load_dict(source: dict[str, Any]) -> DictConfig:
    """Merges a dictionary over its includes."""
    content = dict(source)
    includes = content.pop("include", [])
    names = [includes] if isinstance(includes, str | Path) else includes
    try:
        own = cast(DictConfig, OmegaConf.create(content))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"the config cannot be read: {_first_line(error)}.") from error
    return cast(DictConfig, OmegaConf.merge(*[_load_file(find_config(name), seen=(), files=[]) for name in names], own))


def _problem_lines(error: ValidationError) -> list[str]:
    """Returns one line per problem: the key, what is allowed, its value; for an unknown key, the closest known one."""
    allowed: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for problem in error.errors():
        is_unknown = (
            problem["type"] == "extra_forbidden"
        )  # then the last part is the user's key, whatever it looks like
        *parents, last = [str(part) for part in problem["loc"]] or [""]
        where = [part for part in parents if not _is_union_branch(part)]
        where += [last] if last and (is_unknown or not _is_union_branch(last)) else []
        key = ".".join(where) or "config"
        if is_unknown:
            known = _known_keys(where[:-1])
            near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean '{'.'.join([*where[:-1], near[0]])}'?" if near else f"known: {', '.join(known)}"
            allowed[key] = [f"unknown key; {hint}"]
        else:
            message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            if problem["type"] == "model_type":  # a section that is one branch of a union
                message = f"must be {{{', '.join(f'{name}: ...' for name in _known_keys(where))}}}"
            allowed.setdefault(key, []).append(message[0].lower() + message[1:])
            if not isinstance(problem["input"], dict | BaseModel) and "password" not in message:
                values[key] = problem["input"]
    return [
        f"  {key}: {', or '.join(messages)}" + (f"; got {values[key]!r}" if key in values else "")
        for key, messages in allowed.items()
    ]


def _is_union_branch(part: str) -> bool:
    """Returns whether Pydantic added this part of a key for a union branch (`constrained-int`, `literal['auto']`)."""
    return part.startswith(("constrained-", "literal[", "function-", "lax-")) or part in (
        "int",
        "str",
        "float",
        "Elastic",
    )


def _known_keys(section: list[str]) -> list[str]:
    model: Any = RunConfig
    for part in section:
        kind = model.model_fields[part].annotation
        model = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel))
    return list(model.model_fields)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def describe() -> str:
    """Returns the Markdown table of all keys with defaults and meanings: the content of `docs/config.md`."""
    lines = ["# Config keys", "", "Generated by `python -m pipeline.config_file`.", ""]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    for name, section in RunConfig.model_fields.items():
        if isinstance(section.default, Section):
            fields = {f"{name}.{key}": field for key, field in type(section.default).model_fields.items()}
        else:
            fields = {name: section}
        for key, field in fields.items():
            lines.append(f"| `{key}` | `{json.dumps(field.default)}` | {field.description or ''} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(describe(), end="")
