"""Optional dependencies: packages that only some commands need, installed as extras of this project."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import UserError

PROJECT = "densenet-pipeline"


@contextmanager
def requires_extra(name: str) -> Iterator[None]:
    """Replaces an import error in the block by an error that names the extra to install.

    Raises:
        UserError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"this needs the package {error.name}, which is not installed: {install_hint(name)}") from error


def install_hint(name: str) -> str:
    """Returns the command that installs an extra, for messages."""
    return f"pip install '{PROJECT}[{name}]'."
