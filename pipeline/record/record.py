"""The record of one run while it goes on: its report, its folder, its stages and what they leave behind."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from passes.errors import RunError, UserError
from pipeline.config.schema import Config
from pipeline.host import interrupts
from pipeline.host.files import DISK, said_by_the_disk, write_text
from pipeline.record.console import StageDisplay
from pipeline.record.report import new_report, strict_json, write_json, write_report
from pipeline.record.unfinished import Unfinished


class StopHere(Exception):
    """The stage asked for with ``until`` is done."""


class Record:
    """Times the stages of one run and keeps everything that they measured, whatever happens next."""

    def __init__(self, config: Config, display: StageDisplay) -> None:
        self.config = config
        self.display = display
        self.report = new_report(config)
        self.folder: Path | None = None
        self._at = "load"
        self._unfinished: Unfinished | None = None
        self.detail = ""
        """Shown beside the stage that is ending."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; raises :class:`StopHere` instead of starting one that lies behind ``until``.

        An interruption that a library dropped ends the stage here, at the latest.
        """
        if not self.config.reaches(name):
            raise StopHere
        self._at, started, self.detail = name, time.perf_counter(), ""
        try:
            with self.display.stage(name):
                interrupts.check()
                self.checkpoint()
                yield
                interrupts.check()
        finally:
            self.report["stages_s"][name] = time.perf_counter() - started
        self.display.done(name, self.report["stages_s"][name], self.detail)

    def fail(self, error: BaseException) -> None:
        """The run ends with ``error``: the report says in which stage, of what kind and why."""
        failure = self.report["failure"] = _failure(self._at, interrupts.asked() or error)
        self.display.failed(self._at, self.report["stages_s"].get(self._at, 0.0), failure["message"])

    def update(self, message: str) -> None:
        """Progress within the stage, where an interruption that a library dropped is noticed too."""
        interrupts.check()
        self.display.update(message)

    def open_folder(self, name: str) -> Path:
        """A new folder of this run's own under ``config.output``."""
        now = datetime.now()
        root = Path(self.config.output) / now.strftime("%Y-%m-%d")
        for attempt in range(1, 1000):
            suffix = "" if attempt == 1 else f"_{attempt}"
            folder = root / f"{now.strftime('%H-%M-%S')}_{name}{suffix}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise self._not_written(error) from None
            self.folder = folder
            try:
                self._unfinished = Unfinished(folder)
                self.checkpoint()
            except OSError as error:
                self.discard_folder()
                raise self._not_written(error) from None
            return folder
        raise UserError(f"output={self.config.output}: holds a thousand runs of this second")

    def _not_written(self, error: OSError) -> UserError:
        return UserError(f"output={self.config.output}: cannot be written ({error.strerror})")

    def checkpoint(self) -> None:
        """Have what was measured so far on disk, should the process be killed."""
        if self._unfinished is not None:
            self._unfinished.write(self.report, self._at)

    def discard_folder(self) -> None:
        """Remove the folder, and those above it that hold nothing else: the run never began."""
        assert self.folder is not None
        if self._unfinished is not None:
            self._unfinished.release(done=True)
        for folder in (self.folder, self.folder.parent, Path(self.config.output)):
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def keep(self, name: str, text: str) -> None:
        """Leave ``text`` as a file of the run."""
        assert self.folder is not None
        write_text(self.folder / name, text)

    def keep_json(self, name: str, content: Any) -> None:
        assert self.folder is not None
        write_json(self.folder / name, content)

    def note(self, message: str) -> None:
        """Something the reader of the report must know."""
        self.report["notes"].append(message)
        self.display.note(message)

    def close(self, status: str) -> None:
        """Write report.json; a run that failed stays failed.  Where the disk does not take it, the run has failed
        too, and the report is printed: nothing that was measured is lost."""
        self.report["status"] = "failed" if self.report["failure"] else status
        assert self.folder is not None
        try:
            write_report(self.folder / "report.json", self.report)
        except OSError as error:
            self.report["status"] = "failed"
            self.note(f"report.json: {said_by_the_disk(error)}; it is printed here instead")
            if self.report["failure"] is None:
                self.report["failure"] = _failure("record", error)
            with suppress(OSError):  # standard output may lie on the same disk
                print(strict_json(self.report), flush=True, file=sys.stdout)

    def release(self, sent: bool) -> None:
        """The run is over; not ``sent``: the next start has to send it."""
        if self._unfinished is not None:
            assert self.folder is not None
            self._unfinished.release(done=sent and (self.folder / "report.json").is_file())


def _failure(stage: str, error: BaseException) -> dict[str, str]:
    if not isinstance(error, Exception):
        by = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else "SIGTERM"
        return {"stage": stage, "kind": "interrupted", "message": f"interrupted by {by}"}
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, RunError):
        return {"stage": stage, "kind": error.kind, "message": message}
    if isinstance(error, UserError):
        return {"stage": stage, "kind": "refused", "message": message}
    if isinstance(error, OSError) and error.errno in DISK:
        return {"stage": stage, "kind": "disk", "message": said_by_the_disk(error)}
    # torch.OutOfMemoryError by its name: torch need not be loaded here.  On the CPU torch has no class for it.
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    out_of_memory |= isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in message
    kind = "out_of_memory" if out_of_memory else type(error).__name__
    return {"stage": stage, "kind": kind, "message": message, "traceback": "".join(traceback.format_exception(error))}
