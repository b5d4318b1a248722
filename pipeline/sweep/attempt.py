"""One attempt at a job of a sweep: what happens in the process of its own, and how it is read when that has ended.

Neither talks to MLflow: the report on disk is what counts, and it is sent when the attempt is over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from passes.errors import UserError
from pipeline.config.schema import Config
from pipeline.host.files import locked
from pipeline.host.plain_json import from_json
from pipeline.record import unfinished
from pipeline.record.console import StageDisplay
from pipeline.record.environment import environment
from pipeline.record.record import Record
from pipeline.record.sections import Failure, Report
from pipeline.sweep.isolation import Ended
from pipeline.sweep.ledger import Entry, Ledger
from pipeline.tracking.names import folder_name
from pipeline.tracking.runs import Tracked

if TYPE_CHECKING:
    from pipeline.host.turn import Turn

LOG_FILE = "run.log"


def attempt(config: Config, key: str, name: str, turn: Turn | None = None) -> int:
    """Do the job with content key ``key`` and leave its report; 0 where that is not one of failure.

    ``name`` is this attempt's; ``turn`` is taken before anything is timed.  A job that somebody else finishes meanwhile
    is not done again.
    """
    from pipeline.host.turn import alone
    from pipeline.run import run

    ledger = Ledger(Path(config.output))
    before = ledger.read(key)
    with locked(ledger.lock_file(key)):
        now = ledger.finished(key)
        if now is not None and (not config.rerun or now[0] != before):
            return 0
        progress = _Progress(ledger, key, Entry(name, time.time()))
        try:
            outcome = run(config, progress, progress.track, turn or alone)
        except UserError as error:
            _failed(progress, config, error)
            return 1
        return 1 if outcome.report["status"] == "failed" else 0


class _Progress(StageDisplay):
    """Shows the stages, and keeps in the ledger which one it is and where the run folder lies."""

    def __init__(self, ledger: Ledger, key: str, entry: Entry) -> None:
        super().__init__()
        self.ledger, self.key, self.entry = ledger, key, entry
        self.write()

    def write(self, **changes: Any) -> None:
        self.entry = replace(self.entry, **changes)
        self.ledger.write(self.key, self.entry)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.write(stage=name)
        with super().stage(name):
            yield

    def track(self, config: Config, folder: Path, environment: Mapping[str, Any]) -> Tracked:
        """Stands in for :func:`pipeline.tracking.runs.start`."""
        self.write(folder=str(folder.relative_to(self.ledger.output)))
        return SentLater()


class SentLater:
    """The record of a run that the sweep sends to MLflow once the run is over."""

    run_id, where, identity = "follows", "sent by the sweep", None

    def finish(self, report: Mapping[str, Any], folder: Path) -> bool:
        return True

    def __enter__(self) -> SentLater:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _failed(progress: _Progress, config: Config, error: UserError) -> None:
    """The load stage refused the job, and so left no report."""
    record = Record(config, progress)
    record.fail(error)
    folder = record.open_folder(folder_name(config))
    progress.write(folder=str(folder.relative_to(progress.ledger.output)))
    record.close("failed")
    record.release(sent=True)


def settle(config: Config, key: str, name: str, ended: Ended, log: Path) -> tuple[Entry, dict[str, Any]]:
    """The attempt ``name`` and its report, which is written here where the process could not."""
    ledger = Ledger(Path(config.output))
    entry = ledger.read(key)
    if entry is None or entry.attempt != name:
        finished = ledger.finished(key)
        if ended.exit_code == 0 and finished is not None:
            return finished  # by somebody else
        entry = Entry(name, time.time() - ended.seconds)
    report = ledger.report(entry)
    if report is None or (ended.timed_out and report["status"] == "failed"):
        record = Record(config, StageDisplay())
        so_far = None if entry.folder is None else unfinished.read(ledger.output / entry.folder)
        known = report or (so_far or {}).get("report")
        if known is not None:
            record.report = from_json(Report, known)
        else:
            record.put(environment=environment())
        record.put(failure=_why(ended, config, entry.stage))
        if entry.folder is None:
            folder = record.open_folder(folder_name(config))
            entry = replace(entry, folder=str(folder.relative_to(ledger.output)))
        assert entry.folder is not None
        record.folder = ledger.output / entry.folder
        record.folder.mkdir(parents=True, exist_ok=True)
        record.close("failed")
        record.release(sent=True)
        unfinished.clear(record.folder)
        ledger.write(key, entry)
        report = ledger.report(entry)
    assert entry.folder is not None and report is not None
    with suppress(FileNotFoundError):
        log.replace(ledger.output / entry.folder / LOG_FILE)
    return entry, report


def _why(ended: Ended, config: Config, stage: str) -> Failure:
    if ended.interruption is not None:
        by = "Ctrl-C" if isinstance(ended.interruption, KeyboardInterrupt) else "SIGTERM"
        return Failure(stage, "interrupted", f"interrupted by {by}")
    if ended.timed_out:
        limit = f"sweep.timeout_minutes={config.sweep.timeout_minutes:g}"
        return Failure(stage, "timeout", f"took longer than {limit} and was ended")
    if ended.out_of_memory:
        return Failure(stage, "out_of_memory", "the kernel killed it: the host's memory had run out")
    how = f"killed by {ended.signal_name}" if ended.signal_name else f"ended with exit code {ended.exit_code}"
    return Failure(stage, "crash", f"{how} and left no report; what it printed is in {LOG_FILE}")
