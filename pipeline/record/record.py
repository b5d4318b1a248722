"""The record of one run while it goes on: its report, its folder, its stages and what they leave behind."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import RunError, UserError, message_line
from pipeline.config.schema import Config
from pipeline.host import interrupts
from pipeline.host.files import DISK, said_by_the_disk, write_text
from pipeline.host.plain_json import to_json
from pipeline.record.console import SUMMARY, StageDisplay, described
from pipeline.record.plots import PICTURE, latency_plot
from pipeline.record.report import calls_table, strict_json, write_json, write_report
from pipeline.record.sections import DecodeProgram, Failure, Status, new_report
from pipeline.record.unfinished import Unfinished

if TYPE_CHECKING:
    from pipeline.engine.sections import Attention, Engine
    from pipeline.measure.until_settled import BenchmarkResult


SHORT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",  # of torch on the CPU, which has no class for it
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS' and cuDNN's words for a cudaMalloc that failed, in their manuals
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
"""What a RuntimeError says where memory had run out."""


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
        self.stop_before(name)
        self._at, started, self.detail = name, time.perf_counter(), ""
        try:
            with self.display.stage(name):
                interrupts.check()
                self.checkpoint()
                yield
                interrupts.check()
        finally:
            seconds = time.perf_counter() - started
            self.put(stages_s={**self.report.stages_s, name: seconds})
        self.display.done(name, seconds, self.detail)

    def stop_before(self, name: str) -> None:
        """Raises :class:`StopHere` where stage ``name`` lies behind ``until``."""
        if not self.config.reaches(name):
            raise StopHere

    def put(self, **sections: Any) -> None:
        """Have ``sections`` in the report."""
        self.report = replace(self.report, **sections)

    def put_graph(self, name: str, file: str, graph: Any) -> None:
        """Leave the graph of the program ``name`` as a file of the run."""
        self.keep(_of(name, file), str(graph))

    def put_attention(self, name: str, attention: Attention) -> None:
        """Have what became of the calls of the program ``name`` in the report, and as a table."""
        self.keep(_of(name, "attention_calls.md"), calls_table(attention.calls))
        self._put_program(name, attention=attention)

    def put_engine(self, name: str, engine: Engine) -> None:
        """Have what is known of the engine ``name`` in the report."""
        self._put_program(name, engine=engine)

    def _put_program(self, name: str, **section: Any) -> None:
        """Sections of ``engine`` are the report's own; those of ``decode`` stand together."""
        if name == "engine":
            self.put(**section)
        else:
            self.put(decode=replace(self.report.decode or DecodeProgram(), **section))

    def put_benchmark(self, result: BenchmarkResult) -> None:
        """Have what was timed in the report, and its samples beside it."""
        assert self.folder is not None
        self.put(benchmark=result.benchmark)
        write_json(self.folder / "samples.json", result.samples)

    def draw(self, result: BenchmarkResult) -> None:
        """Leave a picture of the samples."""
        assert self.folder is not None
        latency_plot(result.samples, self.folder / PICTURE)

    @property
    def content(self) -> dict[str, Any]:
        """The report as report.json says it."""
        made: dict[str, Any] = to_json(self.report)
        return made

    def fail(self, error: BaseException) -> None:
        """The run ends with ``error``: the report says in which stage, of what kind and why."""
        failure = _failure(self._at, interrupts.asked() or error)
        self.put(failure=failure)
        self.display.failed(self._at, self.report.stages_s.get(self._at, 0.0), failure.message)

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
            self._unfinished.write(self.content, self._at)

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

    def note(self, *messages: str) -> None:
        """Something the reader of the report must know."""
        self.put(notes=(*self.report.notes, *messages))
        for message in messages:
            self.display.note(message)

    def close(self, status: Status) -> None:
        """Write report.json; a run that failed stays failed.  Where the disk does not take it, the run has failed
        too, and the report is printed: nothing that was measured is lost."""
        self.put(status="failed" if self.report.failure else status)
        assert self.folder is not None
        try:
            write_report(self.folder / "report.json", self.content)
        except OSError as error:
            self.put(status="failed", failure=self.report.failure or _failure("record", error))
            self.note(f"report.json: {said_by_the_disk(error)}; it is printed here instead")
            with suppress(OSError):  # standard output may lie on the same disk
                print(strict_json(self.content), flush=True, file=sys.stdout)
        with suppress(OSError):  # says nothing that the report does not
            self.keep(SUMMARY, described(self.content))

    def release(self, sent: bool) -> None:
        """The run is over; not ``sent``: the next start has to send it."""
        if self._unfinished is not None:
            assert self.folder is not None
            self._unfinished.release(done=sent and (self.folder / "report.json").is_file())


def _of(name: str, file: str) -> str:
    """``file`` of the program ``name``."""
    return file if name == "engine" else f"{name}_{file}"


def _failure(stage: str, error: BaseException) -> Failure:
    if not isinstance(error, Exception):
        by = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else "SIGTERM"
        return Failure(stage, "interrupted", f"interrupted by {by}")
    message = message_line(error)
    if isinstance(error, RunError):
        return Failure(stage, error.kind, message)
    if isinstance(error, UserError):
        return Failure(stage, "refused", message)
    if isinstance(error, OSError) and error.errno in DISK:
        return Failure(stage, "disk", said_by_the_disk(error))
    # torch.OutOfMemoryError by its name: torch need not be loaded here.
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    out_of_memory |= isinstance(error, RuntimeError) and any(said in message for said in SHORT_OF_MEMORY)
    kind = "out_of_memory" if out_of_memory else type(error).__name__
    return Failure(stage, kind, message, "".join(traceback.format_exception(error)))
