"""Files that appear whole or not at all, and the disk's own words where they cannot."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from passes.errors import UserError

PART = ".part"
DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""Errors of the disk, not of the program that writes: full, over quota, over a size limit, read-only, failing."""
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
