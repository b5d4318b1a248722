"""Reports of several lengths and batches for tests: real ones, with other times."""

from __future__ import annotations

import copy
from pathlib import Path

from reports import generating, keep, real

TIMES = {  # ms, at each length
    "detect_causal": {128: 1.4, 512: 2.3, 2048: 8.6, 8192: 41.0, 16384: 101.0},
    "upstream": {128: 1.5, 512: 3.1, 2048: 20.5, 8192: 260.0, 16384: 990.0},
    "torch_compile": {128: 1.9, 512: 2.5, 2048: 8.9, 8192: 40.0, 16384: 97.0},
}
LENGTHS = [128, 512, 2048, 8192, 16384]


def at(name: str, ms: float, length: int, batch: int = 1, longest: int | None = None) -> dict:
    """The real report of ``name`` as one of schema 2 that timed a prompt of ``length``; ``longest``: of an engine for
    every length up to it."""
    report = copy.deepcopy(real(f"llama3_1b-{name}")) | {"schema": 2}
    report |= {"unavailable": None, "decode": None}
    static = {"kind": "static", "batch": batch, "min": length, "opt": length, "max": length, "exact": []}
    dynamic = {"kind": "dynamic", "batch": batch, "min": 2, "opt": longest, "max": longest, "exact": []}
    report["config"]["shape"] = dynamic if longest else static
    report["benchmark"]["prefill"] = entry(report, ms, length, batch)
    for case in report["verify"]["cases"]:
        case["yardsticks"] = {}
    return report


def entry(report: dict, ms: float, length: int, batch: int = 1) -> dict:
    made = copy.deepcopy(report["benchmark"]["prefill"]) | {"batch": batch, "input_length": length}
    for clock in ("device_ms", "host_ms", "enqueue_ms"):
        factor = ms / report["benchmark"]["prefill"]["device_ms"]["median"]
        made[clock] = {**made[clock], "median": ms, "ci95": [factor * end for end in made[clock]["ci95"]]}
    return made | {"floor_ms": None, "roofline_fraction": None, "tainted": []}


def static_lengths(folder: Path) -> Path:
    """A report for each length and way, and two ways that were timed at one length alone."""
    for name, times in TIMES.items():
        for length, ms in times.items():
            keep(folder / f"{name}_{length}", at(name, ms, length))
    for name in ("lowering", "mask_input"):
        keep(folder / name, at(name, 9.1, 2048))
    return folder


def dynamic_lengths(folder: Path) -> Path:
    """A report for each way, of one engine that was timed at every length."""
    for name, times in TIMES.items():
        report = at(name, times[2048], 2048, longest=16384)
        report["benchmark"]["prefill_shapes"] = [
            entry(report, ms, length) for length, ms in times.items() if length != 2048
        ]
        keep(folder / name, report)
    return folder


def batches(folder: Path) -> Path:
    for batch in (1, 4, 16):
        for name, cache, step in (("detect_causal", "in_engine", 1.1), ("torch_compile", "static", 1.7),
                                  ("upstream", "none", 21.0 * batch)):  # fmt: skip
            report = generating(at(name, 9.0 * batch, 2048, batch, longest=2048), cache, 9.0 * batch, step)
            report["benchmark"]["generate"]["batch"] = batch
            keep(folder / f"{name}_{batch}", report)
    return folder
