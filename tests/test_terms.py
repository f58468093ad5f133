"""Names, help and docs use the field's terms: home-made words do not come back."""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
CODE = ("pipeline", "launch", "benchmarks", "tests", "k8s")
DOCS = ("*.md", "docs/*.md", "configs/**/*.yaml", "k8s/**/*.yaml", "examples/*.ipynb", "Makefile")

NAMES = re.compile("DenseNet|ImageNet")  # names that contain a word below

# Words of identifiers, each with the term to use.
IDENTIFIERS = {
    "picture": "image",
    "pictures": "images",
    "damaged": "corrupt",
    "damage": "corruption",
    "told": "log, warn, report",
    "net": "model",
    "nets": "models",
    "seal": "commit",
    "sealed": "committed",
    "mend": "fix",
    "mended": "fixed",
    "fault": "error, problem",
    "faults": "errors, problems",
    "cure": "fix",
    "spoiled": "non_finite",
    "witness": "exit_notice",
    "hub": "event_channel",
    "claimed": "locked",
    "room": "space, resources",
    "anew": "again",
}

# Prose: regular expressions, each with the term to use.
PROSE = {
    r"pictures?": "image",
    r"damaged?": "corrupt",
    r"nets?": "model",
    r"no numbers?": "NaN or infinite",
    r"(goes|go|went|going) on": "resumes, continues",
    r"anew": "again, recomputes",
    r"told|tells? of": "prints, logs, warns",
    r"sealed|seals": "committed",
    r"sound (one|checkpoint|weights|file|set|image)s?": "valid",
    r"mend(s|ed|ing)?": "fix",
    r"(?<!page )faults?(?![ -]tolera)": "error, problem",
    r"cures?": "fix",
    r"spoiled": "non-finite, corrupt",
    r"left out|leaves? out|leaving out": "skipped, ignored, omit",
    r"made[- ]up": "synthetic",
    r"(store|server|tracker|registry|place) that is away|is away": "unreachable",
    r"(?<!moving )average of (the|its) weights": "EMA of the weights",
    r"number format": "dtype",
    r"(a|the|its|their|two|both|which) nets?": "model",
    r"lies? (in|at|below|beside)": "is in, is stored in",
    r"beside": "next to, in addition to",
    r"settles?|settled": "chooses, determines",
    r"looks? (at|whether)": "checks, reads",
    r"half precision": "mixed precision",
    r"trainings": "runs",
}


def files(*patterns: str) -> list[Path]:
    found = {file for pattern in patterns for file in PROJECT.glob(pattern)}
    return sorted(file for file in found if file.name not in ("CHANGELOG.md", Path(__file__).name))


def python_files() -> list[Path]:
    return files(*(f"{folder}/**/*.py" for folder in CODE))


def words(identifier: str) -> Iterator[str]:
    """Splits an identifier: `_NotAnImage_2HW` becomes not, an, image, hw."""
    for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", NAMES.sub("", identifier)):
        yield part.lower()


def tokens(file: Path, kind: int) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
        if token.type == kind:
            yield token.start[0], token.string


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Lines of docs and configs; strings and comments of code."""
    if file.suffix != ".py":
        yield from enumerate(file.read_text().splitlines(), 1)
        return
    for kind in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)):
        yield from tokens(file, kind)


def test_identifiers_use_the_fields_terms():
    found = [
        f"{file.relative_to(PROJECT)}:{line}: {name}: use {IDENTIFIERS[word]}"
        for file in python_files()
        for line, name in tokens(file, tokenize.NAME)
        for word in words(name)
        if word in IDENTIFIERS
    ]
    found += [
        f"{file.relative_to(PROJECT)}: use {IDENTIFIERS[word]}"
        for file in python_files()
        for word in words(file.stem)
        if word in IDENTIFIERS
    ]
    assert not found, "\n".join(found)


def test_prose_uses_the_fields_terms():
    patterns = {re.compile(rf"\b({pattern})\b", re.IGNORECASE): term for pattern, term in PROSE.items()}
    found = [
        f"{file.relative_to(PROJECT)}:{line}: '{match[0]}': use {term}"
        for file in [*python_files(), *files(*DOCS)]
        for line, text in prose(file)
        for pattern, term in patterns.items()
        for match in pattern.finditer(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("left_out", ["left", "out"]),
        ("NotAnImage", ["not", "an", "image"]),
        ("_GPU_2HW", ["gpu", "hw"]),
        ("CifarDenseNet", ["cifar"]),
    ],
)
def test_identifiers_are_split_into_words(name, expected):
    assert list(words(name)) == expected
