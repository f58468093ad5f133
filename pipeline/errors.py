"""Errors that are the user's to mend: shown as one short message, never as a traceback."""


class UserError(Exception):
    """Something outside the code is wrong, and the message says what to do about it.

    The message names the field or file, its value, what is allowed and the next step. The command line
    prints it and exits with code 2.
    """


class ConfigError(UserError):
    """A configuration file or an override is wrong."""


class DataError(UserError):
    """A data folder or a file in it is wrong."""


class DamagedSample(DataError):
    """One sample's bytes are not a whole picture, or not those that were indexed."""


class TrainingError(Exception):
    """Training failed in the workers for a reason that is not known to be the user's."""
