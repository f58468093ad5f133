"""What names of files and folders tell: which split, a list of labels, an archive that must be unpacked."""

import re

SPLIT_WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation", "dev"}}


def words_of(name: str) -> set[str]:
    """The words in a file's or folder's name, in lower case."""
    return set(re.split(r"[^a-z]+", name.lower())) - {""}


def is_list(name: str) -> bool:
    """Whether a file may be a list of labels."""
    return name.lower().endswith((".csv", ".tsv"))


def is_packed(name: str) -> bool:
    """Whether a file is a compressed archive, which cannot be read where it lies."""
    return name.lower().endswith((".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"))
