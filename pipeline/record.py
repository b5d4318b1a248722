"""The record of one run while it goes on: its report, its folder, its stages and what they leave behind."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from passes.errors import RunError, UserError
from pipeline.config import Config
from pipeline.console import StageDisplay
from pipeline.report import new_report, write_json


class StopHere(Exception):
    """The stage asked for with ``until`` is done."""


class Record:
    """Times the stages of one run and keeps everything that they measured, whatever happens next."""

    def __init__(self, config: Config, display: StageDisplay) -> None:
        self.config = config
        self.display = display
        self.report = new_report(config)
        self.folder: Path | None = None
        self.detail = ""
        """Shown beside the stage that is ending."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; raises :class:`StopHere` instead of starting one that lies behind ``until``."""
        if not self.config.reaches(name):
            raise StopHere
        started, self.detail = time.perf_counter(), ""
        try:
            with self.display.stage(name):
                yield
        except Exception as error:
            self.report["stages_s"][name] = time.perf_counter() - started
            if not isinstance(error, UserError):
                self.report["failure"] = _failure(name, error)
                self.display.failed(name, self.report["stages_s"][name], self.report["failure"]["message"])
            raise
        self.report["stages_s"][name] = time.perf_counter() - started
        self.display.done(name, self.report["stages_s"][name], self.detail)

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
                raise UserError(f"output={self.config.output}: cannot be written ({error.strerror})") from None
            self.folder = folder
            return folder
        raise UserError(f"output={self.config.output}: holds a thousand runs of this second")

    def keep(self, name: str, text: str) -> None:
        """Leave ``text`` as a file of the run."""
        assert self.folder is not None
        (self.folder / name).write_text(text, encoding="utf-8")

    def keep_json(self, name: str, content: Any) -> None:
        assert self.folder is not None
        write_json(self.folder / name, content)

    def note(self, message: str) -> None:
        """Something the reader of the report must know."""
        self.report["notes"].append(message)
        self.display.note(message)

    def close(self, status: str) -> None:
        """Write report.json; a run that failed stays failed."""
        self.report["status"] = "failed" if self.report["failure"] else status
        self.keep_json("report.json", self.report)


def _failure(stage: str, error: Exception) -> dict[str, str]:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    kind = error.kind if isinstance(error, RunError) else type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        kind = "out_of_memory"
    failure = {"stage": stage, "kind": kind, "message": lines[0]}
    if not isinstance(error, RunError):
        failure["traceback"] = "".join(traceback.format_exception(error))
    return failure
