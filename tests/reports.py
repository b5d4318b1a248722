"""Reports for tests: real ones of schema 1, kept as they were when their figures were written here, and whether one is
what docs/report.schema.json says."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.compare.labels import Section, sections
from pipeline.compare.rows import Row, row
from pipeline.compare.sources import Found
from pipeline.record.report import upgraded

ROOT = Path(__file__).resolve().parent.parent
SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "report.schema.json").read_text())
REAL = Path(__file__).parent / "kept_reports" / "h200_rtx_1_4"


def conforms(folder: Path) -> dict[str, Any]:
    """The report in ``folder``, which is as docs/report.schema.json says."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    if find_spec("jsonschema"):  # a GPU host without a package index may lack it
        from jsonschema import Draft202012Validator

        Draft202012Validator(SCHEMA).validate(report)
    return report


def real(name: str) -> dict[str, Any]:
    """A real report, ``llama3_1b-upstream`` say."""
    report: dict[str, Any] = json.loads((REAL / f"{name}-fp16-static.json").read_text())
    return report


def keep(folder: Path, report: dict[str, Any], samples: dict[str, Any] | None = None) -> Path:
    """``report`` in ``folder`` as a run leaves it."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    if samples is not None:
        (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def timed(report: dict[str, Any], factor: float) -> dict[str, Any]:
    """``report`` with every time of its benchmark ``factor`` times as long."""
    changed = copy.deepcopy(report)
    for name in ("device_ms", "host_ms", "enqueue_ms"):
        summary = changed["benchmark"]["prefill"][name]
        summary["median"] *= factor
        summary["ci95"] = [factor * end for end in summary["ci95"]]
    return changed


def failed(report: dict[str, Any], stage: str, kind: str, message: str) -> dict[str, Any]:
    changed = copy.deepcopy(report) | {"status": "failed", "benchmark": None, "verify": None}
    changed["failure"] = {"stage": stage, "kind": kind, "message": message}
    return changed


def generating(report: dict[str, Any], cache: str, ttft_ms: float, tpot_ms: float) -> dict[str, Any]:
    """``report`` of a run that also timed a generation of 128 tokens."""
    changed = copy.deepcopy(report)
    changed["config"]["cache"] = {"name": cache, "capacity": None}

    def summary(ms: float) -> dict[str, Any]:
        return {"median": ms, "mad": ms / 100, "p05": None, "p95": None, "n": 9, "ci95": [0.99 * ms, 1.02 * ms]}

    whole = ttft_ms + 127 * tpot_ms
    changed["benchmark"]["generate"] = {
        "batch": 1, "input_length": 2048, "output_length": 128, "device_ms": summary(whole), "host_ms": summary(whole),
        "ttft_ms": summary(ttft_ms), "tpot_ms": summary(tpot_ms), "floor_ms": 81.0, "roofline_fraction": 81 / whole,
        "tainted": [],
    }  # fmt: skip
    changed["benchmark"]["decode"] = {"floor_ms": 0.59, "roofline_fraction": 0.59 / tpot_ms}
    return changed


def varied(folder: Path) -> Path:
    """A sweep with every kind of row: timed, tainted, generating, failed, not executed, unavailable."""
    for path in REAL.glob("*.json"):
        keep(folder / path.stem, json.loads(path.read_text()))
    llama = real("llama3_1b-detect_causal")
    oom = 'needs 141.2 GiB of device memory, 3.1 GiB are free <b>&"quoted" | piped'
    bf16 = copy.deepcopy(llama)
    bf16["config"]["precision"] = "bf16"
    keep(folder / "oom", failed(bf16, "build", "out_of_memory", oom))
    for strategy, cache, ttft, tpot in (
        ("detect_causal", "in_engine", 9.3, 1.5),
        ("detect_causal", "static", 9.4, 1.9),
        ("upstream", "none", 20.9, 21.0),
    ):
        keep(folder / f"{strategy}_{cache}", generating(real(f"llama3_1b-{strategy}"), cache, ttft, tpot))
    plugin = failed(llama, "", "", "") | {
        "status": "unavailable",
        "failure": None,
        "notes": ["TensorRT-RTX has no plugins"],
    }
    plugin["config"]["cache"] = {"name": "static"}
    plugin["config"]["strategy"] = {"name": "mask_input"}
    keep(folder / "plugin", plugin)
    on_cpu = copy.deepcopy(llama) | {"status": "not_executed", "benchmark": None}
    on_cpu["environment"] |= {"gpu": None, "compute_capability": None, "supported_by_vendor": None}
    on_cpu["verify"]["executed"] = "graph"
    keep(folder / "cpu", on_cpu)
    return folder


def rows_of(*reports: dict) -> list[Row]:
    return [row(Found(upgraded(report), f"report {i}")) for i, report in enumerate(reports)]


def only_section(*reports: dict) -> Section:
    (section,) = sections(rows_of(*reports))
    return section
