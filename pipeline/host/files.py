"""Files that appear whole or not at all, several names for one file, locks, sums, and the disk's own words."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from passes.errors import UserError

PART = ".part"
DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""Errors of the disk, not of the program that writes: full, over quota, over a size limit, read-only, failing."""
LINKED_BYTES = 1 << 16
"""From this size on a file is shared and not copied; what is smaller may be edited where it lies."""
NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})
"""Answers of ``link(2)`` where two names cannot be of one file: another file system, one without links, somebody
else's file."""
TRIAL_BYTES = 1 << 16
"""More than a file system gives away without allocating, less than any report."""


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes ``path`` at the end of the block, and is removed where the block fails.

    Raises :class:`OSError` that names ``path``: that of a write names no file.
    """
    part = Path(path).with_name(Path(path).name + PART)
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise


def write_text(path: Path, text: str) -> None:
    """``text`` as the file ``path``, see :func:`draft`."""
    with draft(path) as part:
        part.write_text(text, encoding="utf-8")


def share(source: Path, target: Path) -> None:
    """Have what ``source`` holds as ``target`` too, whole or not at all: a large file under a second name (a hard link)
    where the file system can, else a copy.

    Whoever removes or replaces one name leaves the other alone; a file that may have several is never written in place.
    """
    with draft(target) as part:
        part.unlink(missing_ok=True)
        if source.stat().st_size < LINKED_BYTES or not _linked(source, part):
            shutil.copyfile(source, part)
        elif target.exists() and target.samefile(part):  # rename(2) would leave both names
            target.unlink()


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        return False
    return True


@contextmanager
def locked(path: Path, timeout_s: float | None = None, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file ``path`` among processes; the system drops the lock when its holder dies.

    ``waiting`` is called once where another process holds it.  Raises :class:`TimeoutError` where one still does after
    ``timeout_s``; None waits as long as it takes.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock, longest = FileLock(path, mode=0o644), -1 if timeout_s is None else timeout_s
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        if longest == 0:
            raise
        if waiting is not None:
            waiting()
        lock.acquire(timeout=longest)
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_in(folder: Path) -> int:
    """Bytes of the files below ``folder``; a file may go while they are counted."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total


def check_output(output: str) -> None:
    """Raises :class:`UserError` where nothing can be written below ``output``; creates nothing."""
    folder = Path(output).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(TRIAL_BYTES))
    except OSError as error:
        raise UserError(f"output={output}: cannot be written ({error.strerror})") from None


def said_by_the_disk(error: OSError) -> str:
    """One line that names the file."""
    path = error.filename2 or error.filename  # of a copy, the file that was being written
    return f"{error.strerror}: {path}" if path else str(error.strerror or error)
