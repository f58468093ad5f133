"""Classifies names of files and folders: splits, CSV files, compressed archives."""

import re

SPLIT_WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation", "dev"}}


def words_of(name: str) -> set[str]:
    """Returns the words in a file's or folder's name, in lower case."""
    return set(re.split(r"[^a-z]+", name.lower())) - {""}


def is_csv(name: str) -> bool:
    """Whether a name is that of a CSV or TSV file, which may be a list of labels."""
    return name.lower().endswith((".csv", ".tsv"))


def is_compressed(name: str) -> bool:
    """Whether a name is that of a compressed archive, which must be unpacked before reading."""
    return name.lower().endswith((".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"))
