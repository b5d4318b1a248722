"""Which job left its report where.  ``OUTPUT/jobs/KEY.json`` names the run folder of the job with that content key;
how the job ended stands in the folder's report.json and nowhere else, so the two cannot disagree."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.record.report import read_report, write_json


@dataclass(frozen=True)
class Entry:
    """The latest attempt at a job."""

    attempt: str
    """Tells this attempt from those before."""
    started: float
    """Seconds since the epoch."""
    stage: str = "load"
    """The stage that it is in, or was in when it ended."""
    folder: str | None = None
    """Its run folder, relative to ``output``, which may be moved as a whole; None: it has none yet."""


@dataclass(frozen=True)
class Ledger:
    output: Path

    def lock_file(self, key: str) -> Path:
        """Whoever does the job holds it."""
        return self._file(key).with_suffix(".lock")

    def write(self, key: str, entry: Entry) -> None:
        self._file(key).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file(key), asdict(entry))

    def read(self, key: str) -> Entry | None:
        try:
            return Entry(**json.loads(self._file(key).read_text()))
        except (FileNotFoundError, ValueError, TypeError):  # there is none, or none that can be read
            return None

    def report(self, entry: Entry) -> dict[str, Any] | None:
        """The report of that attempt; None while there is none, where it was thrown away, or cannot be read."""
        if entry.folder is None:
            return None
        return read_report(self.output / entry.folder / "report.json")

    def finished(self, key: str) -> tuple[Entry, dict[str, Any]] | None:
        """The attempt that finished the job, and its report; None: it must be done."""
        entry = self.read(key)
        report = None if entry is None else self.report(entry)
        return None if entry is None or report is None or report["status"] == "failed" else (entry, report)

    def _file(self, key: str) -> Path:
        return self.output / "jobs" / f"{key[:32]}.json"
