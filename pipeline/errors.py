"""Errors that the user can fix: the command line prints one short message, never a traceback."""

from collections.abc import Sequence

_MAX_LISTED = 5


class UserError(Exception):
    """Bad input or a broken environment: the message names what is wrong and how to fix it.

    The message names the field or file, its value, what is allowed and the next step. The command line
    prints it and exits with code 2.
    """


class ConfigError(UserError):
    """A configuration file or an override is invalid."""


class DataError(UserError):
    """A data folder or a file in it is invalid."""


class CheckpointFormatError(UserError):
    """Another version of this project wrote the checkpoint, in a format that this version does not read."""


class CorruptSample(DataError):
    """A sample's bytes do not decode to a whole image, or differ from those that were indexed."""


class TrainingError(Exception):
    """Training failed in the workers for a reason that the user may not be able to fix."""


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Joins the first five names and appends the number of the others: `a, b, c, d, e, and 3 more`."""
    more = len(names) - _MAX_LISTED
    return separator.join(names[:_MAX_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")
