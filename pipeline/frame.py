"""The frame around a run: its folder, its run in MLflow, its report, and an orderly end whatever happens inside."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from passes.errors import UserError
from pipeline.config.schema import Config
from pipeline.host import interrupts
from pipeline.host.files import check_output
from pipeline.host.memory import collector_paused, trim
from pipeline.record.console import StageDisplay
from pipeline.record.record import Record, StopHere
from pipeline.record.sections import Status

if TYPE_CHECKING:
    from pipeline.tracking.runs import Tracked

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Outcome:
    """``report`` is what report.json in ``folder`` says."""

    report: dict[str, Any]
    folder: Path


def framed(
    config: Config,
    display: StageDisplay | None,
    track: Callable[..., Tracked] | None,
    load: Callable[[Record], Loaded],
    work: Callable[[Record, Path, Loaded], Status],
) -> Outcome:
    """``load``, and then ``work`` in the run's folder; a :class:`UserError` of ``load`` is passed on, and then nothing
    was created.  Whatever goes wrong later is in the report.  Ctrl-C and SIGTERM are passed on, with the report
    written.  ``track`` stands in for :func:`pipeline.tracking.runs.start`."""
    from pipeline.tracking import recovery, runs
    from pipeline.tracking.names import folder_name

    record = Record(config, display or StageDisplay())
    check_output(config.output)
    recovers = track is None
    if track is None:
        runs.check_store(config.tracking.uri)
        track = runs.start
    interruption: BaseException | None = None
    status: Status = "failed"
    try:
        with record.stage("load"), collector_paused():
            loaded = load(record)
    except Exception as error:
        interrupts.check()  # a library may have made another error of it
        if isinstance(error, UserError):
            raise
        record.fail(error)
    gc.collect()
    trim()
    gc.freeze()  # a million objects of the libraries that the collector need not walk again and again
    with interrupts.held():  # an interruption ends the work, not the opening or the closing of the run
        folder = record.open_folder(folder_name(config))
        try:
            tracked = track(config, folder, environment=record.content["environment"])
        except BaseException:
            record.discard_folder()
            raise
        record.put(mlflow=tracked.identity)
        with tracked:
            try:
                with interrupts.allowed():
                    record.checkpoint()
                    record.note(*config.notes)
                    if recovers:
                        recovery.recover(config, record.display.note)
                    if record.report.failure is None:
                        status = work(record, folder, loaded)
            except StopHere:
                status = "ok"
            except Exception as error:
                record.fail(error)
            except BaseException as error:
                record.fail(error)
                interruption = error
            record.close(status)
            sent = tracked.finish(record.content, folder)
            record.release(sent)
        record.display.summary(record.content, folder, f"run {tracked.run_id}  ({tracked.where})")
        if not sent:
            record.display.note("the next start with this output and this store sends the rest to MLflow")
    if interruption is not None:
        raise interruption
    return Outcome(record.content, folder)


def unavailable(record: Record) -> None:
    """Record why the attention plugin cannot run here."""
    from passes.tensorrt.versions import load_stack
    from pipeline.record.environment import environment
    from pipeline.rivals.plugin import why_not

    stack = load_stack()
    record.put(environment=environment(stack.versions()))
    record.put(unavailable=(reason := why_not(record.config.backend, stack)))
    record.note(f"unavailable: {reason}")
