"""Files that a reader's work depends on: checked before the work, replaced whole, appended under a lock."""

import os
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock


class OutputError(ValueError):
    """A file cannot be written. The message names it and says what to do."""


def partial_path(path):
    """Return a path beside `path` that nobody else uses, for its unfinished content."""
    return path.with_name(f"{path.name[:50]}.{uuid4().hex[:12]}.partial")  # at most 255 bytes


@contextmanager
def replacing(path):
    """Yield a temporary path to write to; rename it to `path` on success, delete it after an error.

    Two writers of one file do not disturb each other: the file is always the whole work of one of them.
    """
    path = Path(path)
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path, text):
    """Write `text` to the file `path` in UTF-8; after an error or interruption the old file is there."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def append_line(path, line):
    """Add one line to the file `path`, created if missing, while no other process does."""
    with FileLock(f"{path}.lock"), open(path, "a+b") as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        cut_off = file.read() not in (b"", b"\n")  # a writer was stopped within its line
        file.write((b"\n" if cut_off else b"") + line.encode() + b"\n")


def check_outputs(*paths):
    """Raise OutputError unless a file can be written at each of `paths`; missing folders are created.

    Call it before work that takes long, with every file that the work will write.
    """
    for path in map(Path, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_present(path)
            probe = partial_path(path)
            probe.touch()
            probe.unlink()
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{path} cannot be written ({reason}): choose another place") from error


def check_present(path):
    """Raise OSError if what is at `path` is no ordinary file, or write-protected, or its name is too long."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("a folder or device is there")
        if not os.access(path, os.W_OK):
            raise PermissionError("the file there is write-protected")
