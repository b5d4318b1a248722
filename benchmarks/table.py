"""Prints the README's result tables from the report.json files in ``benchmarks/results``.

python -m benchmarks.table            # the tables
python -m benchmarks.table --write    # into README.md, between its markers
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.generation_table import generation_tables, is_generation
from pipeline.compare.sources import read_file
from pipeline.record.report import worst_case

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: made by benchmarks/table.py -->", "<!-- end of results -->"


def rows(report: dict[str, Any]) -> list[str]:
    """One row of the table, cell by cell."""
    config, verify, prefill = report["config"], report["verify"], report["benchmark"]["prefill"]
    engine = report["engine"] or {}
    backend, shape = config["backend"]["name"], config["shape"]
    device, host = prefill["device_ms"], prefill["host_ms"]
    worst = worst_case(verify)
    layers = "–"
    if engine:
        layers = f"{engine['iattention']} ({engine['iattention_causal']} causal, {engine['iattention_masked']} masked)"
    length = f"{shape['min']}..{shape['max']}" if shape["kind"] == "dynamic" else str(shape["max"])
    if exact := shape.get("exact"):
        length += f", and {', '.join(map(str, exact))} with a profile of its own"
    return [
        (config["strategy"]["name"] if backend == "tensorrt" else f"`backend={backend}`")
        + (", cuDNN attention off" if config["backend"].get("cudnn_attention") is False else "")
        + ("" if config["precision"] == "fp16" else f", {config['precision']}"),
        length,
        f"{device['median']:.2f} ({device['ci95'][0]:.2f}–{device['ci95'][1]:.2f})",
        f"{host['median']:.2f}",
        f"{prefill['roofline_fraction']:.0%}",
        layers,
        f"{worst['relative_error']:.2g} / {worst['tolerance']:.2g}",
        "power-limited" if any("power" in taint for taint in prefill["tainted"]) else "",
    ]


def tables() -> str:
    """Every model of ``benchmarks/results`` as Markdown tables, generation before prefill, fastest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    every = [read_file(path).report for path in sorted(RESULTS.rglob("*.json"))]
    for report in every:
        if is_generation(report):
            continue
        found.setdefault(report["config"]["model"]["name"], []).append(report)
    header = (
        "| strategy or rival | length | device ms, median (95 %) | host ms | of the roofline "
        "| native attention layers | relative error / allowed | |\n|---|---|---|---|---|---|---|---|\n"
    )
    text = []
    for model, reports in found.items():
        environment, weights = reports[0]["environment"], reports[0]["model"]["weights"]
        support = "" if environment["supported_by_vendor"] else " (not supported by the vendor on this GPU)"
        text.append(
            f"**{model}**, {weights} weights, fp16 where no other precision is named, prefill of 2048 tokens, batch 1; "
            f"{environment['gpu']}, compute capability {environment['compute_capability']}, "
            f"{environment['flavour']} {environment['tensorrt']}{support}, torch {environment['torch']}\n\n"
        )
        reports.sort(key=lambda report: report["benchmark"]["prefill"]["device_ms"]["median"])
        text.append(header + "".join("| " + " | ".join(rows(report)) + " |\n" for report in reports) + "\n")
    return (generation_tables(every) + "".join(text)).rstrip() + "\n"


def main() -> None:
    if "--write" not in sys.argv:
        print(tables())
        return
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{tables()}{END}{after}")


if __name__ == "__main__":
    main()
