"""Lists folders: files, special files, hidden files. Follows links; opens no file."""

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


@dataclass(frozen=True, slots=True)  # up to a million instances
class Entry:
    """A file or folder: name, path on disk and file system attributes; links are followed."""

    name: str
    path: str
    is_folder: bool
    is_link: bool
    length: int
    mtime_ns: int
    identity: tuple[int, int]


@dataclass
class Tree:
    """The files below a folder by relative path, sorted; problems of unusable entries by path; ignored files."""

    files: dict[str, Entry] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)


def ignore_reason(name: str) -> str | None:
    """Returns why a name is ignored: it is hidden, or of file managers and tools; None if it may be data."""
    if name.lower() in _SYSTEM_NAMES or name.startswith("._"):
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


def member_ignore_reason(path: str) -> str | None:
    """As `ignore_reason`, for a path inside an archive."""
    return next((reason for part in path.split("/") if part != "." and (reason := ignore_reason(part))), None)


def entries(folder: str | Path, prefix: str, ignored: IgnoredFiles) -> Iterator[Entry | tuple[str, str]]:
    """Yields a folder's entries sorted by name; for an unusable entry yields its printable name and the problem.

    `prefix`, the folder's path below the root, precedes the names in `ignored`.

    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            reason = ignore_reason(entry.name)
            if reason is not None:
                ignored.add(reason, printable(joined(prefix, entry.name)))
                continue
            problem = None
            try:
                status = entry.stat()
            except OSError as error:
                yield printable(entry.name), _stat_problem(entry, error)
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
    """Lists all files below a folder, at any depth. Follows links to folders; lists each folder once.

    Problems are links to folders that are already listed, special files, broken links, folders that cannot be read, and
    names that are not UTF-8.
    """
    found = Tree()
    status = root.stat()
    seen = {(status.st_dev, status.st_ino): "."}
    links: list[tuple[str, Entry]] = []
    _list(str(root), "", found, seen, links)
    while links:  # last, so that real folders keep their own paths
        prefix, entry = links.pop(0)
        if entry.identity in seen:
            found.problems[prefix] = f"is a link to a folder that is already listed as {seen[entry.identity]}"
            continue
        seen[entry.identity] = prefix
        _list(entry.path, prefix, found, seen, links)
    found.files = dict(sorted(found.files.items()))
    found.problems = dict(sorted(found.problems.items()))
    return found


def _list(
    folder: str, prefix: str, found: Tree, seen: dict[tuple[int, int], str], links: list[tuple[str, Entry]]
) -> None:
    """Lists a folder and its subfolders; appends linked folders to `links`."""
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
    """Joins a path below the root."""
    return f"{prefix}/{name}" if prefix else name


def is_utf8(name: str) -> bool:
    """Whether a file name is valid UTF-8; Python represents other bytes as lone surrogates."""
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)


def printable(name: str) -> str:
    r"""Returns a file name as text; bytes that are not UTF-8 become `\xNN`."""
    return name if is_utf8(name) else os.fsencode(name).decode(errors="backslashreplace")


def _stat_problem(entry: os.DirEntry[str], error: OSError) -> str:
    if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"is a broken link to {printable(os.readlink(entry.path))}"
    return f"cannot be read ({error.strerror})"
