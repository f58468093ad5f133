"""What lies in folders: files, what is none, what file managers leave behind. Links are followed, nothing is opened."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.ignored import IgnoredFiles

SYSTEM = "files and folders of file managers and tools"
HIDDEN = "hidden files and folders"
_SYSTEM_NAMES = {"thumbs.db", "desktop.ini", ".ds_store", "__macosx", "@eadir", ".ipynb_checkpoints"}
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


@dataclass(frozen=True, slots=True)  # there are a million of them
class Entry:
    """A file or folder: its name, its path on disk and what the file system says of it, links followed."""

    name: str
    path: str
    is_folder: bool
    is_link: bool
    length: int
    mtime_ns: int
    identity: tuple[int, int]


@dataclass
class Tree:
    """What lies below a folder: files by path below it in sorted order, and what is wrong with the rest, by path."""

    files: dict[str, Entry] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)


def system_reason(name: str) -> str | None:
    """Why a name is never data: it is hidden, or file managers and tools leave such files; None where it may be."""
    if name.lower() in _SYSTEM_NAMES or name.startswith("._"):
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


def member_reason(path: str) -> str | None:
    """As `system_reason`, for a path inside an archive."""
    return next((reason for part in path.split("/") if part != "." and (reason := system_reason(part))), None)


def entries(folder: str | Path, prefix: str, ignored: IgnoredFiles) -> Iterator[Entry | tuple[str, str]]:
    """A folder's entries by name; for what is neither file nor folder its printable name, and what is wrong.

    `prefix`, the folder's path below the root, is what comes before names that are counted in `ignored`.

    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            reason = system_reason(entry.name)
            if reason is not None:
                ignored.add(reason, printable(joined(prefix, entry.name)))
                continue
            problem = None
            try:
                status = entry.stat()
            except OSError as error:
                yield printable(entry.name), _unusable(entry, error)
                continue
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                kind = next((kind for is_it, kind in _KINDS if is_it(status.st_mode)), "special file")
                problem = f"is a {kind}, not a file"
            elif not is_utf8(entry.name):
                problem = "has a name that is not UTF-8: rename it"
            if problem is not None:
                yield printable(entry.name), problem
                continue
            yield Entry(
                entry.name,
                entry.path,
                stat.S_ISDIR(status.st_mode),
                entry.is_symlink(),
                status.st_size,
                status.st_mtime_ns,
                (status.st_dev, status.st_ino),
            )


def tree(root: Path) -> Tree:
    """All files below a folder, at any depth. Linked folders are followed, and each folder is listed once.

    A folder that is met again through a link, and all that is neither file nor folder, cannot be listed, or has no
    name in UTF-8, is among the problems.
    """
    found = Tree()
    status = root.stat()
    seen = {(status.st_dev, status.st_ino): "."}
    links: list[tuple[str, Entry]] = []
    _list(str(root), "", found, seen, links)
    while links:  # after the folders that lie there, which keep their own paths
        prefix, entry = links.pop(0)
        if entry.identity in seen:
            found.problems[prefix] = f"is a link to a folder that is listed already, as {seen[entry.identity]}"
            continue
        seen[entry.identity] = prefix
        _list(entry.path, prefix, found, seen, links)
    found.files = dict(sorted(found.files.items()))
    found.problems = dict(sorted(found.problems.items()))
    return found


def _list(
    folder: str, prefix: str, found: Tree, seen: dict[tuple[int, int], str], links: list[tuple[str, Entry]]
) -> None:
    """Lists a folder and those in it; linked ones are put aside."""
    todo = [(folder, prefix)]
    while todo:
        folder, prefix = todo.pop()
        try:
            for entry in entries(folder, prefix, found.ignored):
                if isinstance(entry, tuple):
                    name, problem = entry
                    found.problems[joined(prefix, name)] = problem
                elif not entry.is_folder:
                    found.files[joined(prefix, entry.name)] = entry
                elif entry.is_link or entry.identity in seen:
                    links.append((joined(prefix, entry.name), entry))
                else:
                    seen[entry.identity] = joined(prefix, entry.name)
                    todo.append((entry.path, joined(prefix, entry.name)))
        except OSError as error:
            found.problems[prefix or "."] = f"cannot be listed ({error.strerror})"


def joined(prefix: str, name: str) -> str:
    """A path below the root."""
    return f"{prefix}/{name}" if prefix else name


def is_utf8(name: str) -> bool:
    """Whether a name from the file system is text: Python carries other bytes in it as lone surrogates."""
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)


def printable(name: str) -> str:
    r"""A name from the file system as text: bytes that are not UTF-8 are shown as `\xNN`."""
    return name if is_utf8(name) else os.fsencode(name).decode(errors="backslashreplace")


def _unusable(entry: os.DirEntry[str], error: OSError) -> str:
    if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"is a link that leads nowhere, to {printable(os.readlink(entry.path))}"
    return f"cannot be read ({error.strerror})"
