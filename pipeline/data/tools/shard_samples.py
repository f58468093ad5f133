"""Samples of a WebDataset shard: an image and its label, matched by member names and first bytes."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.data.formats import SIGNATURE_BYTES, detect_format
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.listing import member_ignore_reason
from pipeline.data.tools.tars import Member
from pipeline.errors import DataError, listed

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif")
_LABEL_EXTENSIONS = ("cls", "json")
ReadBytes = Callable[[int, int], bytes]


@dataclass(frozen=True)
class _ImageMember:
    """An image member and its sample's key; `field` is the rest of its name: `jpg`, or `seg.png` for a second image."""

    member: Member
    key: str
    field: str


def read_samples(
    members: Iterable[Member], read: ReadBytes, where: str, ignored: IgnoredFiles
) -> list[tuple[int, Member]]:
    """Returns the labels and images of a shard in its order.

    The label of an image `NAME.EXTENSION` is in `NAME.cls` or `NAME.json`; NAME may contain dots. So a key is not cut
    at its first dot, as WebDataset does, unless no longer NAME matches. A member is an image by its first bytes or by
    its extension. Second images of a sample, `NAME.FIELD.EXTENSION` in addition to `NAME.EXTENSION`, and members of
    other kinds are counted in `ignored`.

    Args:
        members: The shard's members.
        read: Returns the bytes at (offset, length) of the shard.
        where: The shard's name in error messages.
        ignored: Counts the members that are not used.

    Raises:
        DataError: an image has no label, a label has no image, or their match is ambiguous.
    """
    images: list[Member] = []
    labels: dict[str, tuple[int, str]] = {}
    names: set[str] = set()
    for member in members:
        reason = member_ignore_reason(member.name)
        if reason is not None:
            ignored.add(reason, f"{where}, {member.name}")
            continue
        if member.name in names:
            raise DataError(f"{where} has two members named {member.name}, which is ambiguous: rename one.")
        names.add(member.name)
        stem, extension = _split_extension(member.name)
        label = None
        if extension in _LABEL_EXTENSIONS:
            label = parse_label(extension, read(member.offset, member.length), f"{where}, {member.name}")
        elif extension in IMAGE_EXTENSIONS or detect_format(
            read(member.offset, min(SIGNATURE_BYTES, member.length)), member.length
        ):
            images.append(member)
            continue
        if label is None:
            ignored.add(f"members with the extension .{extension}, neither images nor labels", member.name)
        elif labels.setdefault(stem, (label, member.name))[0] != label:
            other, name = labels[stem]
            raise DataError(f"{where}: {member.name} has label {label}, {name} has {other}.")
    images_by_key: dict[str, list[_ImageMember]] = {}
    unlabeled = []
    for member in images:
        key = next((stem for stem in _candidate_keys(member.name) if stem in labels), None)
        if key is None:
            unlabeled.append(member.name)
        else:
            images_by_key.setdefault(key, []).append(_ImageMember(member, key, member.name[len(key) + 1 :]))
    if unlabeled:
        raise DataError(f"{where}: {len(unlabeled)} images have no label in a .cls or .json: {listed(unlabeled)}.")
    without_image = [name for stem, (_, name) in labels.items() if stem not in images_by_key]
    if without_image:
        raise DataError(
            f"{where}: {len(without_image)} labels have no image: {listed(without_image)}. A label and its image have "
            f"the same name except for the extension; images have the extension "
            f"{', '.join(f'.{extension}' for extension in IMAGE_EXTENSIONS)} or begin with an image format's signature."
        )
    return [(labels[key][0], _primary_image(found, where, ignored).member) for key, found in images_by_key.items()]


def _primary_image(images: list[_ImageMember], where: str, ignored: IgnoredFiles) -> _ImageMember:
    """Returns the image of a sample; counts images of other fields, such as `x.seg.png` of `x.jpg`, in `ignored`."""
    primary = [image for image in images if "." not in image.field]
    others = [image for image in images if "." in image.field]
    ambiguous = [image for image in others if not image.field[0].isalpha()]  # x.5.png may be the sample x.5
    if len(images) == 1:
        return images[0]
    if len(primary) != 1 or ambiguous:
        names = [image.member.name for image in images]
        raise DataError(
            f"{where}: a sample has two images, {' and '.join(names[:2])}: keep one, or name the others "
            f"NAME.FIELD.EXTENSION. If they are two samples, each needs a label of its own name."
        )
    for image in others:
        ignored.add(f"second images of samples, .{image.field}", image.member.name)
    return primary[0]


def _split_extension(name: str) -> tuple[str, str]:
    """Returns a member's path without its extension, and the extension in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if dot else (name, "")


def _candidate_keys(name: str) -> Iterable[str]:
    """Yields a member's possible keys, longest first: its path, then the path cut at each dot of the base name."""
    yield name
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        yield f"{folder}{slash}{base}"


def parse_label(extension: str, content: bytes, where: str) -> int | None:
    """Returns the label in a `.cls` member, or under `label` or `cls` in a `.json` member; None if the JSON has none.

    Raises:
        DataError: the label is not an integer.
    """
    try:
        if extension == "cls":
            return int(content)
        fields = json.loads(content)
        value = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
        return None if value is None else _integer(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: the label must be an integer, it is {content[:40]!r}.") from error


def _integer(value: object) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)  # type: ignore[call-overload]
