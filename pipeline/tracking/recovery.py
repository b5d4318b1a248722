"""The next start closes what an earlier one could not: runs whose process was killed, and runs that MLflow lacks.

It looks in two places: the marks in the run folders below ``output`` (:mod:`pipeline.record.unfinished`), and the runs
of this experiment that MLflow says are running though their folder is gone.  Nothing here ends the run that looks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import message_line
from pipeline.config.schema import Config
from pipeline.record.report import read_report, upgraded, write_report
from pipeline.record.unfinished import LOCK, claim, clear, read
from pipeline.tracking import runs
from pipeline.tracking.store import (
    check_store,
    experiment_id,
    open_client,
    quiet,
    redacted,
    search_runs,
    store_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REPORT = "report.json"


def recover(config: Config, say: Callable[[str], None]) -> None:
    """Close the runs below ``config.output``, and those in ``config.tracking``'s experiment, whose process is gone;
    ``say`` is told of each, and of what could not be done."""
    try:
        with quiet():
            uri = check_store(config.tracking.uri, must_exist=True)
            client = open_client(uri)
            experiment = experiment_id(client, uri, config.tracking.experiment)
            running = search_runs(client, experiment, "attributes.status = 'RUNNING'")
        for lock_file in sorted(Path(config.output).glob(f"*/*/{LOCK}")):
            folder = lock_file.parent
            if (lock := claim(folder)) is not None:
                try:
                    _close(folder, client, uri, running, say)
                finally:
                    os.close(lock)
        for run in running:
            _close_without_folder(client, uri, run, say)
    except store_errors() as error:
        say(f"earlier runs could not be closed ({message_line(error)}); the next start tries again")


def _close(folder: Path, client: MlflowClient, uri: str, running: list[Run], say: Callable[[str], None]) -> None:
    """Leave the report of the run in ``folder``, whose process is gone, and send it."""
    state, report = read(folder), read_report(folder / REPORT)
    if state is None and report is None:  # killed before it began
        clear(folder)
        with suppress(OSError):
            folder.rmdir()
        return
    killed = report is None
    if report is None:
        assert state is not None
        report = state["report"] | {"status": "failed", "failure": killed_at(state)}
        if report.get("mlflow") is None:
            report["mlflow"] = _identity(folder, uri, running)
        write_report(folder / REPORT, report)
        report = upgraded(report)
    tracked = report.get("mlflow")
    if tracked is not None and tracked["uri"] != redacted(uri):
        return  # a start that names that store sends it
    if tracked is None or _sent(folder, client, uri, report):
        clear(folder)
        say(f"{folder}: {'its process was killed; closed' if killed else 'was not in MLflow; sent'} now")


def killed_at(state: Mapping[str, Any]) -> dict[str, str]:
    """The failure of a run whose mark is ``state``."""
    process = state["process"]
    message = f"process {process['pid']} on {process['host']}, started {process['started']}, is gone without a word"
    return {"stage": state["stage"], "kind": "killed", "message": message}


def _identity(folder: Path, uri: str, running: list[Run]) -> dict[str, str] | None:
    """The MLflow run of ``folder`` whose id did not get as far as the folder."""
    for run in running:
        if run.data.tags.get(runs.FOLDER) == str(folder.resolve()) and runs.PARENT not in run.data.tags:
            return {"uri": redacted(uri), "experiment_id": run.info.experiment_id, "run_id": run.info.run_id}
    return None


def _sent(folder: Path, client: MlflowClient, uri: str, report: Mapping[str, Any]) -> bool:
    """Whether MLflow now has everything of the run, or does not want it: it was deleted there."""
    from mlflow.exceptions import MlflowException

    tracked = report["mlflow"]
    try:
        if client.get_run(tracked["run_id"]).info.lifecycle_stage != "active":
            return True
    except MlflowException as error:
        return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")
    log_engine = report["config"]["tracking"]["log_engine"]
    run = runs.TrackedRun(client, uri, tracked["experiment_id"], tracked["run_id"], log_engine)
    return run.finish(report, folder)


def _close_without_folder(client: MlflowClient, uri: str, run: Run, say: Callable[[str], None]) -> None:
    """Close a run of this machine whose folder somebody removed: it can be neither going on nor sent."""
    tags = run.data.tags
    folder = tags.get(runs.FOLDER)
    if folder is None or tags.get(runs.HOST) != socket.gethostname() or Path(folder).exists():
        return
    tracked = runs.TrackedRun(client, uri, run.info.experiment_id, run.info.run_id, log_engine=False)
    tracked.close("KILLED", "killed", f"its folder {folder} is gone")
    say(f"MLflow run {run.info.run_id}: its folder {folder} is gone; closed now")
