"""The jobs of a sweep, and what is left of each."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from passes.errors import UserError
from pipeline.config.idle import why_idle
from pipeline.config.overrides import typed
from pipeline.config.schema import Config
from pipeline.record import report
from pipeline.sweep.keys import NOT_SETTINGS, settings_key
from pipeline.tracking.names import run_name


@dataclass(frozen=True)
class Job:
    config: Config
    key: str
    """:func:`pipeline.sweep.keys.settings_key`."""
    label: str
    """What sets it apart from the others: ``strategy=upstream precision=fp16``."""


@dataclass(frozen=True)
class Row:
    """A job that was done, now or before, or that failed."""

    key: str
    label: str
    folder: str
    """Its run folder."""
    skipped: bool
    """It had been finished before."""
    seconds: float
    """How long its process took; 0 for one that was skipped."""
    run_id: str | None
    """Its MLflow run; None: it could not be sent yet."""


def plan(composed: Iterable[tuple[Sequence[str], Config]]) -> list[Job]:
    """The jobs of a sweep, from the overrides and the configuration of each.

    Those that differ only in what has no part in them are one job, and the console says so.  Raises :class:`UserError`
    for two that are the same to the letter, and where they differ in what a sweep has only one of.
    """
    composed = list(composed)
    often = Counter(override for overrides, _ in composed for override in overrides)
    jobs: dict[str, Job] = {}
    merged: Counter[str] = Counter()
    for overrides, config in composed:
        own = [typed(override) for override in overrides if often[override] < len(composed)]
        own = [text for text in own if why_idle(config, text.partition("=")[0]) is None]
        job = Job(config, settings_key(config), " ".join(own) or run_name(config))
        for setting in NOT_SETTINGS:
            if getattr(config, setting) != getattr(composed[0][1], setting):
                raise UserError(f"-m: {job.label} changes {setting}, which the whole sweep has in common; leave it out")
        if (twin := jobs.setdefault(job.key, job)) is not job:
            if twin.config.to_dict() == config.to_dict():
                same = " ".join(map(typed, overrides)) or job.label
                what = same if twin.label == job.label else f"{twin.label} and {job.label}"
                raise UserError(f"-m: {what}: two jobs with the same settings; leave one out")
            merged[twin.label] += 1
    for label, more in merged.items():
        print(f"! {label}: {more} more of the combinations are this job; what else they set has no part in it",
              file=sys.stderr)  # fmt: skip
    return list(jobs.values())


def write_row(folder: Path, row: Row) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / f"{row.key[:32]}.json", asdict(row))


def read_rows(folder: Path) -> dict[str, Row]:
    """Key -> row, in the order in which they were written."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    rows = [Row(**json.loads(path.read_text())) for path in paths]
    return {row.key: row for row in rows}


def read_report(row: Row) -> dict[str, Any]:
    found = report.read_report(Path(row.folder) / "report.json")
    assert found is not None
    return found


def at(content: dict[str, Any], path: str) -> Any:
    """What stands in a report under a dotted name; None where nothing does."""
    value: Any = content
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def headline(content: dict[str, Any]) -> str | None:
    """The number that jobs are compared by: device time of the whole generation where one was timed, else of the
    prefill; None where nothing was."""
    for path in ("benchmark.generate.device_ms.median", "benchmark.prefill.device_ms.median"):
        if at(content, path) is not None:
            return path
    return None
