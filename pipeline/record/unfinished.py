"""What tells a run that goes on from one whose process is gone, and keeps what that one had measured.

In its folder a run has two files more until it is over and MLflow has all of it: ``unfinished.json``, the report so far
and the process, and ``unfinished.lock``, which the process holds locked (``flock``): the system drops the lock
when the process ends, however it ends, and in whichever container it ran.  A lock is believed on the machine that took
it and nowhere else, because not every network file system hands it on.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.host.files import PART
from pipeline.record.report import write_json

STATE, LOCK = "unfinished.json", "unfinished.lock"
FILES = (STATE, LOCK)


class Unfinished:
    """The mark of the run in ``folder``, held by this process.  Raises :class:`OSError` where it cannot be made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        with suppress(OSError):  # a file system without locks: nobody will take the run for dead
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._process = _process()

    def write(self, report: Mapping[str, Any], stage: str) -> None:
        """Keep ``report`` as it is when ``stage`` begins."""
        write_json(self._folder / STATE, {"process": self._process, "stage": stage, "report": report})

    def release(self, done: bool) -> None:
        """The process is done with the run; not ``done``: a later start has something left to do for it."""
        if done:
            clear(self._folder)
        os.close(self._lock)


def clear(folder: Path) -> None:
    """Remove the mark, and what a process that was killed had begun to write."""
    for path in (folder / STATE, *folder.glob(f"*{PART}"), folder / LOCK):
        path.unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any] | None:
    """``process``, ``stage`` and ``report`` of the mark in ``folder``; None: there is none."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state


def claim(folder: Path) -> int | None:
    """The lock of a run that nobody holds any more, as an open file; None: its process lives, or cannot be asked."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    state = read(folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if state is None or _ours(state["process"]):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _boot() -> str | None:
    """Names the kernel that runs, which all containers of a machine share."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _ours(process: Mapping[str, Any]) -> bool:
    """Whether the process ran on this machine."""
    return process["host"] == socket.gethostname() or (process["boot"] is not None and process["boot"] == _boot())
