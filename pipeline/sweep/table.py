"""What came of a sweep: one line a job, and how much faster each is than the baseline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from passes.errors import UserError
from pipeline.compare.sources import SAMPLES, Found
from pipeline.config.axes import Axes, axes, has, parse, settings
from pipeline.record.markdown import table as markdown_table
from pipeline.sweep.jobs import Row, at, headline

NOT_EXECUTED = "not executed: no GPU could run the engine, so nothing was timed"

COLUMNS = ("job", "status", "time", "speed-up", "engine", "why")


def check_baseline(baseline: str, configs: Iterable[Mapping[str, Any]]) -> Axes:
    """What ``sweep.baseline`` names, in the grammar of :mod:`pipeline.config.axes`; raises :class:`UserError` unless
    some of the ``configs``, as they stand in reports, have it."""
    configs = list(configs)
    unset = {key for config in configs for key, _ in settings(config)}
    return parse(baseline, "sweep.baseline=", "setting", [axes(config) for config in configs], unset, "job")


def speed_ups(
    reports: Mapping[str, dict[str, Any]], folders: Mapping[str, Path], baseline: str
) -> dict[str, tuple[float, float, float]]:
    """Key of a job -> ratio, low, high: the time of its baseline over its own, as the comparison of the same reports
    has it (:mod:`pipeline.compare.baseline`).  Jobs that were not timed, and those without one baseline that does the
    same work, are left out."""
    from pipeline.compare.baseline import against_baseline
    from pipeline.compare.labels import sections
    from pipeline.compare.rows import row

    timed = {key: path for key, report in reports.items() if (path := headline(report)) is not None}
    try:
        wanted = check_baseline(baseline, [reports[key]["config"] for key in timed])
    except UserError:  # the jobs that have it were not timed
        return {}
    rows = [row(Found(reports[key], key, _samples(folders[key]))) for key in timed]
    ratios = {each.name: (1.0, 1.0, 1.0) for each in rows if has(each.axes, wanted) and each.timings}
    for section in sections(rows):
        for found in against_baseline(section, wanted):
            _, kind, clock, _ = timed[found.row.name].split(".")
            headlined = (found.measure.kind, found.measure.clock) == (kind, clock)
            if found.time is not None and found.same_work and headlined:
                speed_up = found.time.inverse
                ratios[found.row.name] = (speed_up.value, speed_up.low, speed_up.high)
    return ratios


def entries(
    labels: Mapping[str, str],
    rows: Mapping[str, Row],
    reports: Mapping[str, dict[str, Any]],
    ratios: Mapping[str, tuple[float, float, float]],
) -> list[dict[str, Any]]:
    """The table, for machines: an entry for each job of ``labels``, by key, those that were not begun included."""
    return [_entry(label, rows.get(key), reports.get(key), ratios.get(key)) for key, label in labels.items()]


def _entry(
    label: str, row: Row | None, report: dict[str, Any] | None, ratio: tuple[float, float, float] | None
) -> dict[str, Any]:
    if row is None or report is None:
        return {"job": label, "status": "not_done"}
    path, failure = headline(report), report["failure"]
    return {
        "job": label,
        "status": report["status"],
        "failure": failure and {name: failure[name] for name in ("stage", "kind", "message")},
        "skipped": row.skipped,
        "seconds": sum(report["stages_s"].values()),
        "process_seconds": row.seconds,
        "device_ms": None if path is None else at(report, path.removesuffix(".median")),
        "speed_up": ratio,
        "engine_bytes": at(report, "engine.bytes"),
        "folder": row.folder,
        "run_id": row.run_id,
    }


def markdown(table: Sequence[Mapping[str, Any]], baseline: str | None) -> str:
    """The table, for people."""
    return markdown_table(COLUMNS, (_cells(entry, baseline) for entry in table))


def _cells(entry: Mapping[str, Any], baseline: str | None) -> tuple[str, ...]:
    time, ratio, failure = entry.get("device_ms"), entry.get("speed_up"), entry.get("failure")
    size = entry.get("engine_bytes")
    why = f"{failure['stage']}: {failure['kind']}: {failure['message']}" if failure else ""
    if entry["status"] == "not_executed":
        why = NOT_EXECUTED.partition(": ")[2]
    return (
        str(entry["job"]),
        str(entry["status"]).replace("_", " "),
        f"{time['median']:.2f} ms ({time['ci95'][0]:.2f}–{time['ci95'][1]:.2f})" if time else "",
        f"{ratio[0]:.2f}× ({ratio[1]:.2f}–{ratio[2]:.2f}) {baseline}" if ratio else "",
        f"{size / 1e6:.1f} MB" if size else "",
        why,
    )


def _samples(folder: Path) -> dict[str, Any]:
    """Measurement -> clock -> times in ms; empty where a run kept none."""
    path = folder / SAMPLES
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return kept
