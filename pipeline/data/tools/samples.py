"""Which members of a WebDataset shard are one sample: an image and its label, by their names and first bytes."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.data.formats import SIGNATURE_BYTES, detect_format
from pipeline.data.ignored import IgnoredFiles
from pipeline.data.listing import member_ignore_reason
from pipeline.data.tools.tars import Member
from pipeline.errors import DataError, listed

IMAGE_ENDINGS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif")
_LABELS = ("cls", "json")
Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class _Image:
    """An image's member and its sample's name; `field` is what follows that: `jpg`, or `seg.png` of a second one."""

    member: Member
    key: str
    field: str


def samples(members: Iterable[Member], read: Read, where: str, ignored: IgnoredFiles) -> list[tuple[int, Member]]:
    """The labels and images of a shard, in its order; `read` gives bytes at an offset, `where` names the shard.

    A label `NAME.cls` or `NAME.json` is that of the image `NAME.ENDING`, dots in NAME or not; so a key is not cut at
    its first dot, as WebDataset does, unless there is no longer NAME in common. An image is told by its first bytes or
    by its ending. Second images of a sample, `NAME.FIELD.ENDING` beside `NAME.ENDING`, and members of other kinds are
    counted in `ignored`.

    Raises:
        DataError: an image has no label, a label has no image, or it is not clear which belong together.
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
            raise DataError(f"{where} has two members named {member.name}: which one counts is not clear. Rename one.")
        names.add(member.name)
        stem, ending = _cut(member.name)
        label = None
        if ending in _LABELS:
            label = label_in(ending, read(member.offset, member.length), f"{where}, {member.name}")
        elif ending in IMAGE_ENDINGS or detect_format(
            read(member.offset, min(SIGNATURE_BYTES, member.length)), member.length
        ):
            images.append(member)
            continue
        if label is None:
            ignored.add(f"members with the ending .{ending}, which are neither images nor labels", member.name)
        elif labels.setdefault(stem, (label, member.name))[0] != label:
            other, name = labels[stem]
            raise DataError(f"{where}: {member.name} gives label {label}, {name} gave {other}.")
    of_key: dict[str, list[_Image]] = {}
    without = []
    for member in images:
        key = next((stem for stem in _stems(member.name) if stem in labels), None)
        if key is None:
            without.append(member.name)
        else:
            of_key.setdefault(key, []).append(_Image(member, key, member.name[len(key) + 1 :]))
    if without:
        raise DataError(f"{where}: {len(without)} images have no label in a .cls or .json: {listed(without)}.")
    lonely = [name for stem, (_, name) in labels.items() if stem not in of_key]
    if lonely:
        raise DataError(
            f"{where}: {len(lonely)} labels have no image: {listed(lonely)}. A label's image has the same name but "
            f"for the ending, and ends in {', '.join(f'.{ending}' for ending in IMAGE_ENDINGS)} or begins as one."
        )
    return [(labels[key][0], _first(found, where, ignored).member) for key, found in of_key.items()]


def _first(found: list[_Image], where: str, ignored: IgnoredFiles) -> _Image:
    """The image of a sample, of which others are fields: `x.jpg` beside `x.seg.png`."""
    plain = [image for image in found if "." not in image.field]
    others = [image for image in found if "." in image.field]
    odd = [image for image in others if not image.field[0].isalpha()]  # x.5.png: of a sample named x.5?
    if len(found) == 1:
        return found[0]
    if len(plain) != 1 or odd:
        names = [image.member.name for image in found]
        raise DataError(
            f"{where}: a sample has two images, {' and '.join(names[:2])}: keep one, or name the others "
            f"NAME.FIELD.ENDING. If they are two samples, each needs a label of its own name."
        )
    for image in others:
        ignored.add(f"second images of samples, .{image.field}", image.member.name)
    return plain[0]


def _cut(name: str) -> tuple[str, str]:
    """A member's path without its ending, and the ending in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.rpartition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if dot else (name, "")


def _stems(name: str) -> Iterable[str]:
    """What a member's path may share with its label's, longest first: all, then cut at each dot of the base name."""
    yield name
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        yield f"{folder}{slash}{base}"


def label_in(ending: str, content: bytes, where: str) -> int | None:
    """The label in a `.cls` member, or under `label` or `cls` in a `.json` one; None if the latter has none.

    Raises:
        DataError: it is not a whole number.
    """
    try:
        if ending == "cls":
            return int(content)
        fields = json.loads(content)
        value = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
        return None if value is None else _whole(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: the label must be a whole number, it is {content[:40]!r}.") from error


def _whole(value: object) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)  # type: ignore[call-overload]
