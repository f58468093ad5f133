"""Modules that a run imports before anything looks at its config: they register what `pipeline.extension_points` has not."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def is_file(plugin: str) -> bool:
    """Whether a plugin is told as a file, and not as a module."""
    return plugin.endswith(".py")


def module_name(plugin: str) -> str:
    """The name under which a plugin is imported."""
    return Path(plugin).stem if is_file(plugin) else plugin


def import_plugins(plugins: Sequence[str]) -> None:
    """Imports modules, or files under their own names, each once in a process.

    Raises:
        ValueError: one cannot be imported; the message says why.
    """
    for plugin in plugins:
        try:
            if is_file(plugin):
                _import_file(Path(plugin).expanduser().resolve())
            else:
                importlib.import_module(plugin)
        except Exception as error:  # what a plugin does while it is imported is its own
            raise ValueError(f"plugin {plugin} cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(file: Path) -> None:
    there = sys.modules.get(file.stem)
    if there is not None:
        if Path(getattr(there, "__file__", None) or "").resolve() != file:
            raise ImportError(f"another module is called {file.stem}: rename the file")
        return
    if not file.is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:  # goes on up: a module that is half imported must not be found the next time
        del sys.modules[file.stem]
        raise
