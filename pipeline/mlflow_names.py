"""Validates names of MLflow objects by MLflow's rules, so that a bad name fails before any work.

MLflow takes seconds to import, and accepts model names that its own URIs (`models:/NAME@ALIAS`) cannot contain.
"""

import re

_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_VERSION = re.compile(r"[vV]\d+")
_LONGEST_ALIAS, _LONGEST_MODEL, _LONGEST_EXPERIMENT = 255, 256, 500  # characters


def alias_error(alias: str) -> str | None:
    """Returns what is wrong with the alias of a registered model, or None."""
    if not _ALIAS.fullmatch(alias) or len(alias) > _LONGEST_ALIAS:
        return f"must be letters, digits, - and _, begin with a letter, and have at most {_LONGEST_ALIAS} characters"
    if alias.lower() == "latest" or _VERSION.fullmatch(alias):
        return "is reserved by MLflow, as are `latest` and `v` with a number: choose another, for example candidate"
    return None


def model_name_error(name: str) -> str | None:
    """Returns what is wrong with the name of a registered model, or None."""
    if not name.strip() or name.startswith(".") or any(c in name for c in "/\\:@\0\"'\n"):
        return "must not be blank, begin with a dot, or contain slashes, colons, @, quotes or line breaks"
    if len(name) > _LONGEST_MODEL:
        return f"must have at most {_LONGEST_MODEL} characters"
    return None


def experiment_name_error(name: str) -> str | None:
    """Returns what is wrong with the name of an experiment, or None."""
    if not name.strip() or len(name) > _LONGEST_EXPERIMENT:
        return f"must not be blank, and have at most {_LONGEST_EXPERIMENT} characters"
    return None
