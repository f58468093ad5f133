"""Packages that only some uses need, and that are installed as extras of this project."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import UserError

PROJECT = "densenet-pipeline"


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a failed import inside into an error that names the extra which brings the package.

    Raises:
        UserError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"this needs the package {error.name}, which is not installed: {advice(name)}") from error


def advice(name: str) -> str:
    """How to install an extra, for messages."""
    return f"pip install '{PROJECT}[{name}]'."
