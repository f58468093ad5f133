"""Imports a run's plugins before its config is validated: they register entries in `pipeline.extension_points`."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def is_file(plugin: str) -> bool:
    """Returns whether a plugin is a .py file, not a module name."""
    return plugin.endswith(".py")


def module_name(plugin: str) -> str:
    """Returns the module name under which a plugin is imported."""
    return Path(plugin).stem if is_file(plugin) else plugin


def import_plugins(plugins: Sequence[str]) -> None:
    """Imports modules, and .py files under their stem; each once per process.

    Raises:
        ValueError: one cannot be imported; the message says why.
    """
    for plugin in plugins:
        try:
            if is_file(plugin):
                _import_file(Path(plugin).expanduser().resolve())
            else:
                importlib.import_module(plugin)
        except Exception as error:  # a plugin's code may raise anything
            raise ValueError(f"plugin {plugin} cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(file: Path) -> None:
    loaded = sys.modules.get(file.stem)
    if loaded is not None:
        if Path(getattr(loaded, "__file__", None) or "").resolve() != file:
            raise ImportError(f"another module is called {file.stem}: rename the file")
        return
    if not file.is_file():
        raise FileNotFoundError("the file does not exist")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:  # raised again: the next import must not get a half-imported module
        del sys.modules[file.stem]
        raise
