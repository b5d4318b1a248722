"""Where reports come from: files and folders on disk, or the runs of an MLflow experiment."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from passes.errors import UserError
from pipeline.record.report import READABLE, is_sealed, upgraded
from pipeline.record.unfinished import STATE
from pipeline.tracking.store import (
    artifact,
    as_user_error,
    check_store,
    is_server,
    open_client,
    quiet,
    redacted,
    search_runs,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

REPORT, SAMPLES = "report.json", "samples.json"
OTHERS = (
    SAMPLES,
    "engine.json",
    "decode.json",
    "stored.json",
    STATE,
)  # that a run or the engine store leaves beside a report
UI = "http://localhost:5000"  # where `mlflow ui` listens by default
Made = TypeVar("Made")
STATUSES = ("ok", "failed", "not_executed", "unavailable")


@dataclass(frozen=True)
class Found:
    """A report and where it was."""

    report: dict[str, Any]
    """In the form of schema 3."""
    name: str
    """The file, or the run: what a message calls it."""
    samples: Mapping[str, Any] = field(default_factory=dict)
    """samples.json: measurement -> clock -> times in ms; empty where there is none."""
    link: str | None = None
    """The page of its MLflow run."""


def read(
    sources: list[str], uri: str, make: Callable[[Found], Made], ui: str | None = None
) -> tuple[list[Made], list[str]]:
    """What ``make`` makes of the reports of ``sources``, each a file, a folder, or an experiment in the MLflow store
    ``uri``; and why some of them cannot be read.

    Of a folder, every report.json below it; where there is none, every other JSON file, as in benchmarks/results.
    ``ui`` is where the pages of a store without a server are; where it is None, those of an experiment are where
    `mlflow ui` listens, and a report on disk links to no store of the machine that made it.  Raises
    :class:`UserError` for a source of which nothing can be read.
    """
    made: dict[str, Made] = {}  # a report that is named twice counts once
    unreadable: list[UserError] = []
    for source in sources:
        readable, refused = 0, []
        for report in _reports_of(source, uri, ui):
            try:
                if isinstance(report, UserError):
                    raise report
                found = read_file(report, ui) if isinstance(report, Path) else report
                made[str(report.resolve()) if isinstance(report, Path) else found.name] = make(found)
                readable += 1
            except UserError as error:
                refused.append(error)
        if not readable:
            raise refused[0]
        unreadable += refused
    return list(made.values()), list(dict.fromkeys(map(str, unreadable)))


def _reports_of(source: str, uri: str, ui: str | None) -> Iterable[Path | Found | UserError]:
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        return read_experiment(source, uri, ui or UI)
    files = sorted(path.rglob(REPORT)) or sorted(p for p in path.rglob("*.json") if p.name not in OTHERS)
    if not files:
        raise UserError(f"{source}: no {REPORT} in this folder; name one that runs have written to")
    return files


def read_file(path: Path, ui: str | None = None) -> Found:
    """The report in ``path``, with the samples beside it; raises :class:`UserError` for what is no whole report."""
    report = parse(path, str(path))
    samples_path = path.with_name(SAMPLES)
    samples = {}
    if path.name == REPORT and samples_path.is_file():
        samples = _object(samples_path, str(samples_path))
    tracked = report.get("mlflow")
    try:
        base = tracked and (ui if _is_local(tracked["uri"]) else redacted(tracked["uri"]))
        link = run_page(base, tracked["experiment_id"], tracked["run_id"]) if tracked and base else None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: mlflow={tracked}: is no run's uri, experiment_id and run_id") from None
    return Found(report, str(path), samples, link)


def parse(path: Path, name: str) -> dict[str, Any]:
    """The report in ``path``, which messages call ``name``, :func:`pipeline.record.report.upgraded`."""
    report = _object(path, name)
    if report.get("schema") not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise UserError(f"{name}: schema={report.get('schema')}: only reports of schema {known} can be compared")
    if report.get("status") not in STATUSES:
        raise UserError(f"{name}: status={report.get('status')}: allowed are {', '.join(STATUSES)}")
    if not is_sealed(report):
        raise UserError(f"{name}: was changed after the run (its sha256 is another); take the report from MLflow")
    try:
        return upgraded(report)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{name}: is no report of a run ({error})") from None


def _object(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except ValueError:  # a JSON error, or bytes that are no UTF-8
        raise UserError(f"{name}: is cut off or no JSON; remove it, or repeat its run") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: holds no report, but a JSON {type(content).__name__}")
    return content


def _is_local(uri: str) -> bool:
    """Whether only the machine of the run could open the store: it is a file, or a server on that machine."""
    if not is_server(uri):
        return True
    host = urlsplit(uri).hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def run_page(base: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page on the server ``base``."""
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def read_experiment(name: str, uri: str, ui: str = UI) -> Iterator[Found | UserError]:
    """Every run of experiment ``name``, or why its report cannot be read.

    A run without a report (it still runs, or was killed) is one that failed; a sweep's parent, which is the sum of its
    children, is none.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"{name}: no such file or folder, and no MLflow store {uri} to have an experiment of this name")
    store = check_store(uri, must_exist=True)
    with as_user_error(f"--uri={redacted(uri)}"), quiet(), tempfile.TemporaryDirectory() as copies:
        client = open_client(store)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            known = ", ".join(sorted(e.name for e in client.search_experiments())) or "none"
            raise UserError(
                f"{name}: no such file or folder, and no such experiment in {redacted(uri)}; it has: {known}"
            )
        runs = search_runs(client, experiment.experiment_id)
        parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
        kept = [run for run in runs if run.info.run_id not in parents]
        if not kept:
            raise UserError(f"{name}: this experiment of {redacted(uri)} has no runs")
        for run in kept:
            where = f"run {run.info.run_id}"
            link = run_page(redacted(uri) if is_server(uri) else ui, run.info.experiment_id, run.info.run_id)
            folder = Path(copies) / run.info.run_id
            report = artifact(client, run, REPORT, folder)
            if report is None:
                yield Found(_without_report(run), where, link=link)
                continue
            samples = artifact(client, run, SAMPLES, folder)
            try:
                times = _object(samples, f"{where}, {SAMPLES}") if samples else {}
                yield Found(parse(report, where), where, times, link)
            except UserError as error:
                yield error


def _without_report(run: Run) -> dict[str, Any]:
    """What MLflow's own record of a run tells, in the form of a report."""
    tags = run.data.tags
    config: dict[str, Any] = {}
    for key, text in run.data.params.items():
        *groups, last = key.split(".")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = _value(text)
    still = run.info.status in ("RUNNING", "SCHEDULED")
    why = "still running, or killed without a word" if still else "the run left no report"
    failure = {
        "stage": tags.get("failure.stage", "run"),
        "kind": tags.get("failure.kind", run.info.status.lower()),
        "message": tags.get("failure.message", why),
    }
    environment = {"gpu": tags.get("gpu"), "supported_by_vendor": _value(tags.get("supported_by_vendor", "null"))}
    return {"status": "failed", "failure": failure, "config": config, "environment": environment}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # parameters hold text as it is, everything else as JSON
        return text
