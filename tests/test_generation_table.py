"""The table of issue 4129: every row of a sweep is in it, with its ratio beside the report's, or with its reason."""

from __future__ import annotations

from typing import Any

from test_benchmark_generate import MS, SimulatedGenerator, measured

from benchmarks import generation_table
from benchmarks.generation_table import REPORT_MS
from benchmarks.prompt_table import prompt_tables
from benchmarks.stacks import this_code
from benchmarks.ways import rows
from pipeline.__main__ import compose_config
from pipeline.compare.sources import Found
from pipeline.host.plain_json import to_json
from pipeline.record.sections import new_report


def report(row: str, step_ms: int = 2, model: str = "llama3_1b", **changes: Any) -> dict[str, Any]:
    """A report of ``row`` whose generation took 20 ms and 4 steps of ``step_ms`` of simulated time."""
    made = to_json(new_report(compose_config(["experiment=issue_4129", f"model={model}", f"row={row}"])))
    verify = {"executed": "engine", "passed": True, "cases": []}
    benchmark = to_json(measured(SimulatedGenerator(step_ns=lambda k: step_ms * MS)).report)
    benchmark["generate"] |= made["config"]["benchmark"]["generate"]  # the simulated one is shorter
    return made | {"status": "ok", "environment": GPU, "verify": verify, "benchmark": benchmark} | changes


GPU = {
    "gpu": "Some GPU", "supported_by_vendor": False, "torch": "2.1", "tensorrt": "1.2", "flavour": "tensorrt_rtx",
    "code": this_code(),
}  # fmt: skip


def generation_tables(reports: list[dict[str, Any]]) -> str:
    return generation_table.generation_tables(rows(Found(each, str(i)) for i, each in enumerate(reports)), GPU)


def cells(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_ratio_stands_beside_the_one_of_the_report() -> None:
    engine = {"bytes": 1_000_000_000}
    rows = [
        report("eager", step_ms=45),
        report("upstream", step_ms=20, engine=engine, stages_s={"build": 12.3}),
        report("proved_in_engine", step_ms=5, engine=engine, stages_s={"build": 9.0}),
    ]
    text = generation_tables(rows)

    assert cells(text, "PyTorch eager, no cache")[1:8] == [
        "200.0 (200.0–200.0)",
        "20.00",
        "–",
        "45.000",
        "–",
        "1.0",
        "1.0",
    ]
    upstream = cells(text, "`upstream`, no cache")
    assert upstream[6:8] == ["2.0", f"{7053 / 5466:.1f}"] and upstream[9:11] == ["1000", "12"]
    assert cells(text, "`detect_causal`, cache in the engine")[6:8] == ["5.0", "–"]
    order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]
    assert order[0].endswith("in the engine") and order[-1].startswith("PyTorch"), "fastest first"
    assert "not supported by the vendor" in text.splitlines()[0]


def test_rows_without_a_time_stay_with_their_reason() -> None:
    failure = {"stage": "build", "kind": "build", "message": "no | engine"}
    rows = [
        report("plugin", status="unavailable", unavailable="no add_plugin here", benchmark=None, environment={}),
        report("proved", status="failed", failure=failure, benchmark=None),
        report("eager_dynamic", status="failed", failure={"stage": "x", "kind": "accuracy", "message": "wrong"}),
        report("eager"),
    ]
    text = generation_tables(rows)

    assert cells(text, "attention plugin")[-1] == "unavailable: no add_plugin here"
    assert cells(text, "attention plugin")[7] == f"{7053 / 465:.1f}"
    assert "build: no \\| engine" in text
    assert cells(text, "PyTorch eager, DynamicCache")[1] == "–", "the time of a failed run is not shown"
    assert text.splitlines()[4].startswith("| PyTorch eager, no cache")


def test_every_model_of_the_issue_has_its_five_figures() -> None:
    assert {model: list(times.values()) for model, times in REPORT_MS.items()} == {
        "qwen2_5_0_5b": [4751, 3271, 5421, 1238, 421],
        "qwen3_0_6b": [6875, 4031, 6792, 1708, 569],
        "llama3_1b": [7053, 5466, 8283, 1379, 465],
    }
    both = generation_tables([report("eager"), report("eager", model="qwen3_0_6b")])
    assert "**llama3_1b**" in both and "**qwen3_0_6b**" in both


def test_a_row_of_other_versions_says_so() -> None:
    newer = {"gpu": None, "torch": "3.1", "tensorrt": "2.2", "flavour": "tensorrt_rtx"}
    text = generation_tables(
        [report("eager"), report("plugin", status="unavailable", unavailable="no", environment=newer)]
    )

    assert cells(text, "attention plugin")[-1] == "unavailable: no (TensorRT-RTX 2.2, torch 3.1, without a GPU)"
    assert "TensorRT-RTX 1.2, torch 2.1" in text.splitlines()[0]


def test_prompts_and_generations_have_tables_of_their_own() -> None:
    prompt = to_json(new_report(compose_config(["experiment=prefill", "row=prefill/torch_compile"])))
    both = rows([Found(prompt, "prompt"), Found(report("eager"), "generation")])

    assert generation_table.generation_tables(both[1:], GPU) == "" and prompt_tables(both[:1], GPU) == ""
    assert "| torch.compile | – |" in prompt_tables(both, GPU)
    assert "PyTorch eager, no cache" in generation_table.generation_tables(both, GPU)
