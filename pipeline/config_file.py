"""Reading a config: YAML with includes and overrides, told in words where it is wrong; and the table of all keys.

`include: FILE` (or a list of files, relative to the including file) is merged below the file's own keys, `key=value`
overrides are merged on top, and the result is validated into one frozen `RunConfig`. An override's value is YAML,
unless its key holds text, which is taken as it is: `run.name=007`, `data.root=a #1`.
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

from pipeline.config import RunConfig, Section
from pipeline.errors import ConfigError

BUILT_IN = Path(__file__).parent / "configs"


def built_in() -> dict[str, Path]:
    """The configs that come with the package, by name: the experiments, then the recipes that they include."""
    files = [*sorted(BUILT_IN.glob("*.yaml")), *sorted(BUILT_IN.glob("recipes/*.yaml"))]
    return {file.relative_to(BUILT_IN).with_suffix("").as_posix(): file for file in files}


def find_config(name: str | Path) -> Path:
    """The file that a user means: a path, or the name of a built-in config such as `densenet121`.

    Raises:
        ConfigError: it is no file, and there is no built-in config of that name.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = built_in()
    if path.as_posix() not in known:
        near = difflib.get_close_matches(path.as_posix(), known, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"config '{name}' is neither a file nor built in.{hint} Built in: {', '.join(known)}.")
    return known[path.as_posix()]


def included(path: Path) -> list[Path]:
    """A config file and all that it includes, each once, resolved.

    Raises:
        ConfigError: one of them is missing or is not YAML.
    """
    files: list[Path] = []
    _read(path, seen=(), files=files)
    return list(dict.fromkeys(files))


def load_config(source: str | Path | dict[str, Any], *overrides: str) -> RunConfig:
    """Reads a config with its includes, applies `key=value` overrides and validates the result.

    Args:
        source: A YAML file; the name of a built-in config, such as `demo` or `densenet121`; or the content as nested
            dictionaries, whose `include` names built-in configs or files.
        overrides: Such as `train.epochs=3`, as on the command line.

    Raises:
        ConfigError: a file is missing or is not YAML, a key is unknown, a value is out of range or left to the
            user (`???`); all the problems found are in the message.
    """
    path = "the config" if isinstance(source, dict) else source
    merged = _of_dict(source) if isinstance(source, dict) else _read(find_config(source), seen=(), files=[])
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
            raise ConfigError(f"{path} leaves {' and '.join(missing)} to you: add {missing[0]}=VALUE to the command.")
        return RunConfig.model_validate(OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}.") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is not a valid config:\n" + "\n".join(_problems(error))) from error


def _as_yaml(override: str) -> str:
    """Quotes the text of an override whose key holds text: as YAML, `007` is 7, and ` #1` is a comment."""
    key, _, text = override.partition("=")
    text = text.strip()
    if text in ("", "null", "~") or text[0] in "'\"" or not _holds_text(key.strip()):
        return override
    return f"{key}={json.dumps(text, ensure_ascii=False)}"


def _holds_text(key: str) -> bool:
    kinds: list[Any] = [RunConfig]
    for part in key.split("."):
        kinds = [inner for kind in kinds for inner in _below(kind, part)]
    return str in kinds and set(kinds) <= {str, NoneType}


def _below(kind: Any, part: str) -> list[Any]:
    """The types that a key of a section, or of a dictionary, may have."""
    if get_origin(kind) is dict:
        return _members(get_args(kind)[1])
    if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
        return _members(kind.model_fields[part].annotation)
    return []


def _members(kind: Any) -> list[Any]:
    """A union's types, without what is annotated to them."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for part in get_args(kind) for member in _members(part)]
    return [kind]


def _read(path: Path, seen: tuple[Path, ...], files: list[Path]) -> DictConfig:
    """A file's content over that of its includes; the files are added to `files`."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"config files include each other: {' -> '.join(p.name for p in (*seen, path))}.")
    if not path.is_file():
        here = f" (included by {seen[-1]})" if seen else ""
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=3)
        raise ConfigError(f"config file {path}{here} does not exist." + (f" Near: {', '.join(near)}." if near else ""))
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} must hold `key: value` lines at its top level.")
    files.append(path)
    includes = content.pop("include", [])
    if isinstance(includes, str):
        includes = [includes]
    parts = [_read(path.parent / include, (*seen, path), files) for include in includes]
    return cast(DictConfig, OmegaConf.merge(*parts, content))


def _of_dict(source: dict[str, Any]) -> DictConfig:
    """A dictionary's content over that of its includes."""
    content = dict(source)
    includes = content.pop("include", [])
    names = [includes] if isinstance(includes, str | Path) else includes
    try:
        own = cast(DictConfig, OmegaConf.create(content))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"the config cannot be read: {_first_line(error)}.") from error
    return cast(DictConfig, OmegaConf.merge(*[_read(find_config(name), seen=(), files=[]) for name in names], own))


def _problems(error: ValidationError) -> list[str]:
    """One line per problem: the key, what is allowed, its value; for an unknown key the nearest known one."""
    allowed: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if not _is_union_branch(str(part))]
        key = ".".join(where) or "config"
        if problem["type"] == "extra_forbidden":
            known = _known_keys(where[:-1])
            near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean '{'.'.join([*where[:-1], near[0]])}'?" if near else f"known: {', '.join(known)}"
            allowed[key] = [f"unknown key; {hint}"]
        else:
            message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            if problem["type"] == "model_type":  # a section that stands for a value
                message = f"must be {{{', '.join(f'{name}: ...' for name in _known_keys(where))}}}"
            allowed.setdefault(key, []).append(message[0].lower() + message[1:])
            if not isinstance(problem["input"], dict | BaseModel) and "password" not in message:
                given[key] = problem["input"]
    return [
        f"  {key}: {', or '.join(messages)}" + (f"; got {given[key]!r}" if key in given else "")
        for key, messages in allowed.items()
    ]


def _is_union_branch(part: str) -> bool:
    """Pydantic adds the tried type of a union (`constrained-int`, `literal['auto']`) to a problem's location."""
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
    """All keys with their defaults and meanings, as a Markdown table: the content of `docs/config.md`."""
    lines = ["# Config keys", "", "Written by `python -m pipeline.config_file`.", ""]
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
