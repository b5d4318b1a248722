"""The table of issue 4129 from report.json files: a model at a time, one row for each way to generate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.stacks import caption, versions

REPORT_MS: dict[str, dict[tuple[str, str, str], int]] = {
    # pytorch/TensorRT issue 4129: A100 80GB PCIe, fp16, 2048 tokens in, 128 out, batch 1; ms for the whole generation.
    # Columns PyTorch; sdpa, no cache; iattention; sdpa, static_v1 cache; plugin.  Keys: backend, cache, strategy.
    model: dict(
        zip(
            [
                ("eager", "none", ""),
                ("tensorrt", "none", "upstream"),
                ("tensorrt", "none", "detect_causal"),
                ("tensorrt", "static", "detect_causal"),
                ("plugin", "in_engine", ""),
            ],
            times,
            strict=True,
        )
    )
    for model, times in {
        "qwen2_5_0_5b": (4751, 3271, 5421, 1238, 421),
        "qwen3_0_6b": (6875, 4031, 6792, 1708, 569),
        "llama3_1b": (7053, 5466, 8283, 1379, 465),
    }.items()
}
EAGER = ("eager", "none", "")
CACHES = {"none": "no cache", "dynamic": "DynamicCache", "static": "static cache", "in_engine": "cache in the engine"}
COLUMNS = (
    "row", "whole generation, ms (95 %)", "first token, ms", "prompts back to back, ms", "per token, ms",
    "of the roofline", "times as fast as eager without cache", "the report's, A100", "device memory at its peak, GB",
    "engine, MB", "build, s", "",
)  # fmt: skip


def is_generation(report: dict[str, Any]) -> bool:
    return bool(report["config"]["benchmark"].get("generate"))


def generation_tables(reports: Iterable[dict[str, Any]]) -> str:
    """Every model of ``reports`` as a Markdown table, fastest first; rows without a time last, with their reason."""
    found: dict[str, list[dict[str, Any]]] = {}
    for report in filter(is_generation, reports):
        found.setdefault(report["config"]["model"]["name"], []).append(report)
    return "".join(_table(model, rows) for model, rows in found.items())


def _table(model: str, reports: list[dict[str, Any]]) -> str:
    reports = sorted(reports, key=lambda report: _ms(report) or float("inf"))
    eager_ms = next((ms for report in reports if _key(report) == EAGER and (ms := _ms(report))), None)
    environment: dict[str, Any] = next((r["environment"] for r in reports if (r["environment"] or {}).get("gpu")), {})
    rows = (_row(model, report, eager_ms, environment) for report in reports)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return f"{_heading(model, reports, environment)}\n\n{table}\n"


def _heading(model: str, reports: list[dict[str, Any]], environment: Mapping[str, Any]) -> str:
    config, shape = reports[0]["config"], reports[0]["config"]["benchmark"]["generate"]
    return (
        f"**{model}**, {config['model']['weights']} weights, {config['precision']}, {shape['input_length']} tokens in, "
        f"{shape['output_length']} out, batch {shape['batch']}; {caption(environment)}"
    )


def _row(model: str, report: dict[str, Any], eager_ms: float | None, environment: Mapping[str, Any]) -> list[str]:
    own_ms, published = _ms(report), REPORT_MS.get(model, {})
    then = published.get(_key(report))
    ratio_then = f"{published[EAGER] / then:.1f}" if then else "–"
    if own_ms is None:
        return [label(report), *["–"] * 6, ratio_then, *["–"] * 3, _reason(report) + _elsewhere(report, environment)]
    generate, memory = report["benchmark"]["generate"], report["benchmark"]["memory"]
    low, high = generate["device_ms"]["ci95"]
    engine, prompt = report["engine"] or {}, report["benchmark"].get("prefill")
    decode = (report["decode"] or {}).get("engine") or {}
    fraction = generate["roofline_fraction"]
    stages = {**report["stages_s"], **(report.get("store") or {}).get("stages_s", {})}  # of a stored engine: when built
    build_s = stages.get("build")
    doubts = ["launch-bound"] * generate["launch_bound"]
    doubts += ["power-limited"] * any("power" in taint for taint in generate["tainted"])
    return [
        label(report),
        f"{own_ms:.1f} ({low:.1f}–{high:.1f})",
        f"{generate['ttft_ms']['median']:.2f}",
        "–" if prompt is None else f"{prompt['device_ms']['median']:.2f}",
        f"{generate['tpot_ms']['median']:.3f}",
        "–" if fraction is None else f"{fraction:.0%}",
        "–" if eager_ms is None else f"{eager_ms / own_ms:.1f}",
        ratio_then,
        "–" if memory is None else f"{memory['peak_bytes'] / 1e9:.1f}",
        f"{(engine['bytes'] + decode.get('bytes', 0)) / 1e6:.0f}" if engine.get("bytes") else "–",
        "–" if build_s is None else f"{build_s:.0f}",
        ", ".join(doubts) + _elsewhere(report, environment),
    ]


def _elsewhere(report: dict[str, Any], environment: Mapping[str, Any]) -> str:
    """What a row ran on, where that is not what stands over the table."""
    own = report["environment"] or {}
    if all(own.get(key) in (None, environment.get(key)) for key in ("flavour", "tensorrt", "torch")):
        return ""
    return f" ({versions(own)}{'' if own.get('gpu') else ', without a GPU'})"


def _ms(report: dict[str, Any]) -> float | None:
    """Median device time of the whole generation; None where the row has none, or one of a failed run."""
    if report["status"] != "ok":
        return None
    return ((report["benchmark"] or {}).get("generate") or {}).get("device_ms", {}).get("median")


def _key(report: dict[str, Any]) -> tuple[str, str, str]:
    config = report["config"]
    backend = config["backend"]["name"]
    return backend, config["cache"]["name"], config["strategy"]["name"] if backend == "tensorrt" else ""


def label(report: dict[str, Any]) -> str:
    """What a row of these tables is called."""
    backend, cache, strategy = _key(report)
    mode = report["config"]["backend"].get("mode")
    name = {
        "eager": "PyTorch eager",
        "torch_compile": f"torch.compile ({mode})",
        "plugin": "attention plugin",
    }.get(backend, f"`{strategy}`")
    if backend == "plugin":
        return name
    decodes = backend == "tensorrt" and cache != "none"
    plain = decodes and report["config"]["backend"].get("fused_rows", False) is False
    return f"{name}, {CACHES[cache]}" + (", `backend.fused_rows=false`" if plain else "")


def _reason(report: dict[str, Any]) -> str:
    if report["failure"]:
        return "{kind}: {message}".format(**report["failure"])
    return f"{report['status']}: {report['unavailable']}" if report["unavailable"] else str(report["status"])
