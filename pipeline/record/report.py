"""report.json (schema 1): what a run did and measured.  Every run leaves one, failed runs too."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.host.files import write_text
from pipeline.record import markdown

SCHEMA = 1
SECTIONS = ("attention", "engine", "verify", "benchmark")


def new_report(config: Config) -> dict[str, Any]:
    """An empty report of ``config``: nothing has been done yet, and status is ``failed`` until something was."""
    return {
        "schema": SCHEMA,
        "status": "failed",
        "failure": None,
        "config": config.to_dict(),
        "environment": {},
        "model": {},
        **dict.fromkeys(SECTIONS),
        "store": None,
        "stages_s": {},
        "notes": [],
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write report.json, sealed: its ``sha256`` is that of everything else in it."""
    write_json(path, report | {"sha256": _digest(finite(report))})


def read_report(path: Path) -> dict[str, Any] | None:
    """The report in ``path``; None where there is none of this schema, or none that can be read."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("schema") == SCHEMA else None


def is_sealed(report: dict[str, Any]) -> bool:
    """Whether a report that was read is as it was written; true also of older ones, which have no ``sha256``."""
    return "sha256" not in report or report["sha256"] == _digest(report)


def _digest(report: dict[str, Any]) -> str:
    return sha256_of_json({key: value for key, value in report.items() if key != "sha256"})


def sha256_of_json(content: Any) -> str:
    """sha256, in hex, of ``content`` as JSON with its keys in order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def worst_case(verify: dict[str, Any]) -> dict[str, Any]:
    """The case of a report's ``verify`` section that came closest to its tolerance, or furthest beyond it."""
    worst: dict[str, Any] = max(verify["cases"], key=error_share)
    return worst


def error_share(case: dict[str, Any]) -> float:
    """Relative error of a case over what is allowed; infinite where there was no finite answer (null on disk)."""
    error, allowed = case["relative_error"], case["tolerance"]
    if error is None or allowed is None or not math.isfinite(error) or not allowed > 0:
        return math.inf
    return float(error / allowed)


def write_json(path: Path, content: Any) -> None:
    """Strict JSON: NaN and infinities become null.  Whole or not at all: a reader never sees half a file."""
    write_text(path, strict_json(content) + "\n")


def strict_json(content: Any) -> str:
    """``content`` as strict JSON."""
    return json.dumps(finite(content), indent=2, allow_nan=False, ensure_ascii=False)


def finite(value: Any) -> Any:
    """``value`` as strict JSON takes it: tuples are lists, keys text, NaN and infinities null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def calls_table(calls: Iterable[dict[str, Any]]) -> str:
    """The attention calls as a Markdown table, one row a call."""
    columns = ("index", "name", "mask", "proof", "depends_on", "action", "native_gqa", "scale", "reason")
    lines = ([", ".join(c[k]) if isinstance(c[k], list) else c[k] for k in columns] for c in calls)
    return markdown.table(columns, lines)
