"""A sweep in MLflow: one parent run, one child a job, made from the reports on disk.

Every step can be repeated: it asks the store what is there and adds what is not.  So it does not matter when the
sweep, or the store, goes down.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import message_line
from pipeline.config.schema import Config
from pipeline.host.memory import collector_paused
from pipeline.host.plain_json import to_json
from pipeline.record.report import write_report
from pipeline.tracking import runs
from pipeline.tracking.runs import PARENT
from pipeline.tracking.store import (
    as_user_error,
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

SWEEP, OUTPUT, JOB, SENT = "sweep.key", "sweep.output", "sweep.job", "sweep.report_sha256"
"""Tags: of a parent the sweep and the folder of its runs; of a child the job and, once it is complete, its report."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parent:
    """The parent run; can be handed to another process."""

    uri: str
    experiment: str
    run_id: str
    sent: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Job -> SHA-256 of the report that was complete in MLflow when the sweep was started, and its run."""


def open_parent(config: Config, key: str, name: str) -> Parent:
    """The parent run of the sweep ``key``: the one that was started before, or a new one.

    Parents and children that a killed sweep over the same folder left running are closed; children of this sweep that
    were not sent whole are thrown away.  Raises :class:`UserError` naming ``tracking.uri`` or
    ``tracking.experiment``; nothing exists then.
    """
    uri, output = check_store(config.tracking.uri), str(Path(config.output).resolve())
    with as_user_error(f"tracking.uri={redacted(config.tracking.uri)}"), quiet():
        with collector_paused():  # half a second of MLflow's imports
            client = open_client(uri)
        experiment = experiment_id(client, uri, config.tracking.experiment)
        sweeps = search_runs(client, experiment, f"tags.`{SWEEP}` != ''")
        here = [run for run in sweeps if run.data.tags.get(OUTPUT) == output]  # a path may hold what no filter takes
        theirs = {run.info.run_id for run in here}
        for run in search_runs(client, experiment, "attributes.status = 'RUNNING'"):
            if run.info.run_id in theirs or run.data.tags.get(PARENT) in theirs:
                _close(client, run.info.run_id, "KILLED")
        found = [run.info.run_id for run in here if run.data.tags[SWEEP] == key]
        if found:
            run_id = found[0]
            client.update_run(run_id, status="RUNNING")
        else:
            tags = {"mlflow.user": runs.user(), **runs.SOURCE_TAGS, SWEEP: key, OUTPUT: output}
            run_id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        sent = {}
        for child in search_runs(client, experiment, f"tags.`{PARENT}` = '{run_id}'"):
            if SENT in child.data.tags:
                sent[child.data.tags[JOB]] = (child.data.tags[SENT], child.info.run_id)
            else:
                client.delete_run(child.info.run_id)
    return Parent(uri, experiment, run_id, sent)


def send(
    parent: Parent, config: Config, job: str, folder: Path, report: Mapping[str, Any], started: float, name: str
) -> str | None:
    """Have the job's report in MLflow, as the child ``name`` of ``parent``; its run, or None where the store cannot
    take it now.

    A child with an earlier report of the job makes room: one that had failed is deleted, one that had not stays as a
    run of its own.
    """
    sha256 = hashlib.sha256((folder / "report.json").read_bytes()).hexdigest()
    there, run_id = parent.sent.get(job, (None, None))
    if there == sha256:
        return run_id
    try:
        check_store(parent.uri, must_exist=True)  # else the client would retry for minutes
        with quiet():
            client = open_client(parent.uri)
            same = f"tags.`{PARENT}` = '{parent.run_id}' and tags.`{JOB}` = '{job}'"
            for child in search_runs(client, parent.experiment, same):
                if child.data.tags.get(SENT) == sha256:
                    return str(child.info.run_id)
                if child.info.status == "FINISHED" and SENT in child.data.tags:
                    client.delete_tag(child.info.run_id, PARENT)
                else:
                    client.delete_run(child.info.run_id)
        tags = {PARENT: parent.run_id, JOB: job}
        with runs.start(config, folder, name, environment=report["environment"], tags=tags, started=started) as run:
            report = {**report, "mlflow": to_json(run.identity)}
            write_report(folder / "report.json", report)
            sha256 = hashlib.sha256((folder / "report.json").read_bytes()).hexdigest()
            if not run.finish(report, folder):
                return None
        with quiet():
            client.set_tag(run.run_id, SENT, sha256)
        return run.run_id
    except store_errors() as error:
        _log.warning(f"{folder}: not in MLflow yet ({message_line(error)})")
        return None


def close_parent(
    parent: Parent, files: list[Path], shown: str, numbers: Mapping[str, Mapping[str, float]], status: str
) -> bool:
    """Log the sweep's files, what MLflow's page of it shows, and numbers of it and of its children by run, and end it
    with ``status``; False where the store is gone."""
    try:
        check_store(parent.uri, must_exist=True)
        with quiet():
            client = open_client(parent.uri)
            for path in files:
                client.log_artifact(parent.run_id, str(path))
            client.set_tag(parent.run_id, "mlflow.note.content", shown[: runs.LONGEST_TAG])
            for run_id, metrics in numbers.items():
                for name, value in metrics.items():
                    client.log_metric(run_id, name, value)
            _close(client, parent.run_id, status)
        return True
    except store_errors() as error:
        _log.warning(f"the sweep's run {parent.run_id} is not closed ({message_line(error)})")
        return False


def _close(client: MlflowClient, run_id: str, status: str) -> None:
    with redirect_stdout(StringIO()):  # the client prints links
        client.set_terminated(run_id, status)
