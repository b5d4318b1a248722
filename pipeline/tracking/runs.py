"""Record: a run's settings, numbers and files in MLflow.

``report.json`` on disk is the primary record; what is logged here carries the same names, dotted.
MLflow's global state (active run, tracking URI) is never touched: every call names its store.
"""

from __future__ import annotations

import getpass
import json
import logging
import shlex
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from passes.errors import message_line
from pipeline.host.files import LINKED_BYTES, share, write_text
from pipeline.record import unfinished
from pipeline.record.console import SUMMARY
from pipeline.record.sections import MlflowRun
from pipeline.tracking.fetch import ENGINE_FILE, MANIFEST_FILE, fetch_engine
from pipeline.tracking.names import environment_tags, final_tags, legal, metrics, parameters, run_name, sample_points
from pipeline.tracking.store import (
    as_user_error,
    check_store,
    experiment_id,
    folder_of,
    is_server,
    open_client,
    quiet,
    redacted,
    store_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.config.schema import Config

__all__ = ["ENGINE_FILE", "MANIFEST_FILE", "TrackedRun", "check_store", "fetch_engine", "run_name", "start"]

ENGINE_SUFFIXES = (".trt", ".pt2")
SAMPLES_FILE = "samples.json"
LONGEST_TAG = 8000  # characters that MLflow takes
METRICS_AT_ONCE = 1000
"""MLflow's limit of metrics in one batch (REST API, runs/log-batch)."""
MODEL = "model"
"""Folder of a run's model that answers (:mod:`pipeline.deploy.log`): ``runs:/RUN_ID/model``."""
RUN_OF_MODEL = "run.json"
"""Beside the description of a run's model: which run has its engine, since a model is not always in a run's folder."""
FOLDER, HOST, PARENT = "run_folder", "host", "mlflow.parentRunId"
"""Tags: where the run's files lie, on which machine, and the sweep that it belongs to."""
SOURCE_TAGS = {"mlflow.source.name": "python -m pipeline", "mlflow.source.type": "LOCAL"}

_log = logging.getLogger(__name__)


class Tracked(Protocol):
    """What a run needs of its record: a context manager that is told, once, how the run ended."""

    run_id: str

    @property
    def identity(self) -> MlflowRun | None:
        """What report.json says of the run; None where it is made later."""

    @property
    def where(self) -> str: ...

    def finish(self, report: Mapping[str, Any], folder: Path) -> bool: ...

    def __enter__(self) -> Tracked: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def start(
    config: Config,
    run_folder: Path,
    name: str | None = None,
    environment: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    started: float | None = None,
) -> TrackedRun:
    """Open the MLflow run of ``config``; use the result as a context manager, so that a crash ends the run too.

    ``name`` defaults to :func:`run_name`; ``environment`` is the report's section, where already known; ``started``
    is in seconds since the epoch, and now where it is left out.
    Raises :class:`UserError` naming ``tracking.uri`` or ``tracking.experiment``; no run exists then.
    """
    tracking = config.tracking
    uri = check_store(tracking.uri)
    with as_user_error(f"tracking.uri={redacted(tracking.uri)}"), quiet():
        client = open_client(uri)
        experiment = experiment_id(client, uri, tracking.experiment)
        labels = {
            "mlflow.user": user(),
            **SOURCE_TAGS,
            FOLDER: str(run_folder.resolve()),
            HOST: socket.gethostname(),
            "status": "running",
            **environment_tags(environment or {}),
            **(tags or {}),
        }
        since = None if started is None else int(started * 1000)
        run = client.create_run(experiment, since, labels, run_name=name or run_name(config))
        tracked = TrackedRun(client, uri, experiment, run.info.run_id, tracking.log_engine)
        with ExitStack() as ends_the_run:
            ends_the_run.push(tracked)
            tracked._log_batch(params=parameters(config))
            ends_the_run.pop_all()
    return tracked


class TrackedRun:
    """One open MLflow run.  :meth:`finish` closes it; leaving the ``with`` block without it marks it failed."""

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str, run_id: str, log_engine: bool) -> None:
        self.uri = uri
        self.experiment_id = experiment_id
        self.run_id = run_id
        self._client = client
        self._log_engine = log_engine
        self._open = True

    @property
    def identity(self) -> MlflowRun:
        """What report.json says of the run."""
        return MlflowRun(redacted(self.uri), self.experiment_id, self.run_id)

    @property
    def where(self) -> str:
        """What a person opens to see the run: its page on the server, or the command that shows the store."""
        if is_server(self.uri):
            return f"{redacted(self.uri).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {shlex.quote(redacted(self.uri))}"

    def finish(self, report: Mapping[str, Any], folder: Path) -> bool:
        """Log the numbers of ``report`` (report.json) and every file in ``folder``, and close the run.

        A store that is gone by now costs one warning and the answer False, not the run: everything is in ``folder``
        already.
        """
        status = "FAILED" if report["status"] == "failed" else "FINISHED"
        if (report.get("failure") or {}).get("kind") in ("interrupted", "killed"):
            status = "KILLED"
        stored, complete = "nothing", False
        try:
            with quiet():
                check_store(self.uri, must_exist=True)
                self._log_batch(metrics=metrics(report), tags=final_tags(report) | _description(folder))
                self._log_samples(report, folder / SAMPLES_FILE)
                stored = "only settings and metrics"
                try:
                    self._log_files(folder)
                finally:
                    check_store(self.uri, must_exist=True)  # else the next line would retry for minutes
                    self._terminate(status)
                complete = True
        except store_errors() as error:
            _log.warning(
                f"MLflow run {self.run_id} is incomplete ({message_line(error)}): {stored} stored; all is in {folder}"
            )
        self._open = False
        return complete

    def __enter__(self) -> TrackedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        self._open = False
        killed = kind is not None and not issubclass(kind, Exception)  # Ctrl-C, sys.exit
        self.close(
            "KILLED" if killed else "FAILED",
            kind.__name__ if kind else "unfinished",
            message_line(error) if error else "the run ended without a report",
        )

    def close(self, status: str, kind: str, message: str) -> None:
        """Close the run without a report, as one that failed: tags say how."""
        try:
            with quiet():
                check_store(self.uri, must_exist=True)
                self._log_batch(tags={"status": "failed", "failure.kind": kind, "failure.message": message})
                self._terminate(status)
        except store_errors() as lost:
            _log.warning(f"MLflow run {self.run_id} could not be closed: {message_line(lost)}")

    def _log_batch(
        self,
        params: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        self._client.log_batch(
            self.run_id,
            metrics=[Metric(legal(key), value, now, 0) for key, value in (metrics or {}).items()],
            params=[Param(legal(key), value) for key, value in (params or {}).items()],
            tags=[RunTag(legal(key), value) for key, value in (tags or {}).items()],
        )

    def _log_samples(self, report: Mapping[str, Any], path: Path) -> None:
        """Raw samples as metrics with steps, which MLflow draws as curves: see :func:`sample_points`."""
        if not report["benchmark"] or not path.is_file():
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = sample_points(json.loads(path.read_text()), report["benchmark"])
        made = [Metric(legal(key), value, now, step) for key, step, value in points]
        for start in range(0, len(made), METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=made[start : start + METRICS_AT_ONCE])

    def _log_files(self, folder: Path) -> None:
        """Artifacts that lie on this machine share the engine with the run's folder, see
        :func:`pipeline.host.files.share`."""
        for description in folder.glob(f"{MODEL}/data/*/model.json"):
            write_text(description.with_name(RUN_OF_MODEL), json.dumps({"run_id": self.run_id}) + "\n")
        here = folder_of(self._client.get_run(self.run_id))
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in unfinished.FILES):
            if path.suffix not in ENGINE_SUFFIXES or self._log_engine:
                place = path.relative_to(folder)
                if here is not None and path.stat().st_size >= LINKED_BYTES:
                    (here / place).parent.mkdir(parents=True, exist_ok=True)
                    share(path, here / place)
                    continue
                parent = place.parent.as_posix()
                self._client.log_artifact(self.run_id, str(path), None if parent == "." else parent)

    def _terminate(self, status: str) -> None:
        with redirect_stdout(StringIO()):  # the client prints links to the run; the pipeline's summary has them
            self._client.set_terminated(self.run_id, status)


def _description(folder: Path) -> dict[str, str]:
    """What MLflow's page of the run shows above all else; nothing of a run that was killed."""
    summary = folder / SUMMARY
    return {"mlflow.note.content": summary.read_text(encoding="utf-8")[:LONGEST_TAG]} if summary.is_file() else {}


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return "unknown"
