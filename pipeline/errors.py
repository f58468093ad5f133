"""Errors that are the user's to fix: shown as one short message, never as a traceback."""

from collections.abc import Sequence

_SHOWN = 5


class UserError(Exception):
    """Something outside the code is wrong, and the message says what to do about it.

    The message names the field or file, its value, what is allowed and the next step. The command line
    prints it and exits with code 2.
    """


class ConfigError(UserError):
    """A configuration file or an override is wrong."""


class DataError(UserError):
    """A data folder or a file in it is wrong."""


class OtherFormatError(UserError):
    """A checkpoint was written by another version of this project."""


class CorruptSample(DataError):
    """One sample's bytes are not a whole image, or not those that were indexed."""


class TrainingError(Exception):
    """Training failed in the workers for a reason that is not known to be the user's."""


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN
    return separator.join(names[:_SHOWN]) + (f"{separator}and {more} more" if more > 0 else "")
