"""Quality on the comparison's page, in the registry and in pictures: what is worth having of what precisions cost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from reports import generating, keep, real

from benchmarks import results
from benchmarks.results import Figures
from benchmarks.stacks import Measured, stack_of
from pipeline.compare.__main__ import main
from pipeline.compare.fronts import Front, fronts, on_front
from pipeline.compare.labels import sections
from pipeline.compare.rows import row
from pipeline.compare.sources import Found
from pipeline.record.report import upgraded
from pipeline.sweep.jobs import Row
from pipeline.sweep.registry import best
from pipeline.tracking.names import metrics


def costing(precision: str, increase: float, tpot_ms: float, size: int, **changes: Any) -> dict[str, Any]:
    """A report of a generation at ``precision``, whose perplexity rose by ``increase`` from 20."""
    report = copy.deepcopy(generating(real("llama3_1b-detect_causal"), "in_engine", 9.3, tpot_ms))
    report["config"] |= {"precision": precision, "quantize": {"method": None, "calibration": {"samples": 16}}}
    report["engine"]["bytes"] = size
    rise = {"value": increase, "low": increase - 0.001, "high": increase + 0.001}
    cost = {
        "executed": "engine", "reference": "the unquantised model in float32", "text": "docstrings",
        "text_sha256": "f7", "tokens": 20480, "context": 512,
        "perplexity": {name: 20 * (1 + value) for name, value in rise.items()},
        "reference_perplexity": {"value": 20.0, "low": 18.0, "high": 22.0}, "increase": rise, "kl": 0.01,
        "top1_agreement": 0.97,
        "greedy": {"texts": 8, "tokens": 64, "parted": 5, "first_token": 3, "agreed_tokens": 40.0},
    }  # fmt: skip
    quality = {"not_judged": None, "cost": cost | changes, "max_increase": 0.05, "passed": increase <= 0.05}
    return report | {"quality": quality}


SWEPT = {
    "fp16": costing("fp16", 0.0001, 1.16, 2_471_000_000),
    "int8_weights": costing("int8_weights", 0.004, 0.80, 1_300_000_000),
    "int4_weights": costing("int4_weights", 0.09, 0.95, 800_000_000),
    "fp8": costing("fp8", 0.012, 1.20, 1_290_000_000),
}


def shown(*reports: dict[str, Any]) -> list[Front]:
    (section,) = sections([row(Found(upgraded(each), str(i))) for i, each in enumerate(reports)])
    return list(fronts(section))


def test_worth_having_is_what_no_row_beats_in_price_and_quality() -> None:
    assert on_front([1.0, 2.0, 3.0], [0.3, 0.4, 0.1], [True] * 3) == [True, False, True]
    assert on_front([1.0, 1.0], [0.3, 0.2], [True] * 2) == [False, True]
    assert on_front([1.0, 2.0], [0.2, 0.2], [True] * 2) == [True, False]
    assert on_front([1.0, 2.0], [0.1, 0.2], [False, True]) == [False, True]


def test_quality_is_drawn_against_time_per_token_against_the_prompt_and_against_bytes() -> None:
    tokens, prompt, size = shown(*SWEPT.values())

    assert tokens.title == "Quality against the time per output token, 1 × 2048 + 128 tokens"
    assert "prefill" in prompt.title and size.title == "Quality against bytes"
    assert [point.cells[0] for point in tokens.points] == ["0.800 ms", "0.950 ms", "1.16 ms", "1.20 ms"]
    assert [point.worth for point in tokens.points] == [True, False, True, False]  # int8_weights and fp16
    assert tokens.verdict == "detect_causal, int8_weights, 0.800 ms, +0.40 %; detect_causal, fp16, 1.16 ms, +0.01 %"
    assert [point.cells[0] for point in size.points] == ["800 MB", "1290 MB", "1300 MB", "2471 MB"]
    assert [point.worth for point in size.points] == [False, True, True, True]  # int4_weights lost more than is allowed
    assert size.points[0].css == "bad"
    better, worse = tokens.points[2], tokens.points[1]
    assert better.x > worse.x and better.y > worse.y  # y counts from the top: less of a rise stands lower


def test_the_line_of_the_front_has_a_corner_between_any_two_rows_on_it() -> None:
    (tokens, *_) = shown(*SWEPT.values())
    first, last = (point for point in tokens.points if point.worth)

    assert tokens.steps == [(first.x, first.y), (last.x, first.y), (last.x, last.y)]


def test_rows_that_were_measured_on_another_text_are_left_out_and_counted() -> None:
    other = costing("bf16", 0.0, 1.0, 2_471_000_000, text_sha256="another")

    (tokens, *_) = shown(*SWEPT.values(), other)

    assert len(tokens.points) == 4 and "since they were measured on another text: 1." in tokens.note


def test_a_page_without_quality_says_nothing_of_it_and_one_with_it_has_the_chart_and_the_figures(
    tmp_path: Path,
) -> None:
    def page(folder: Path) -> tuple[str, str]:
        assert main([str(folder), "-o", str(folder)]) == 0
        return (folder / "comparison.html").read_text(), (folder / "comparison.md").read_text()

    keep(tmp_path / "without" / "run", real("llama3_1b-lowering"))
    assert not any("perplexity" in text or "Quality" in text for text in page(tmp_path / "without"))

    for name, report in SWEPT.items():
        keep(tmp_path / "with" / name, report)
    html, markdown = page(tmp_path / "with")
    assert html.count("Quality against bytes</h3>") == 1 and 'class="worth"' in html
    assert "21.8, +9.00 % (+8.90 to +9.10) FAILED" in markdown and "| yes |" in markdown


def test_perplexity_and_its_rise_are_metrics_under_plain_names() -> None:
    logged = metrics(upgraded(SWEPT["int8_weights"]))

    assert logged["perplexity"] == pytest.approx(20.08) and logged["perplexity_increase"] == pytest.approx(0.004)
    assert logged["quality.cost.greedy.first_token"] == 3


def test_the_registrys_best_quality_is_the_least_rise_of_perplexity_and_the_least_error_where_none_was_measured() -> (
    None
):
    reports = copy.deepcopy(SWEPT)
    for case in reports["fp8"]["verify"]["cases"]:
        case["relative_error"] /= 1000
    rows = {name: Row(name, name, "", False, 1.0, name) for name in reports}

    def won() -> str:
        (aliases,) = best(rows, {name: upgraded(report) for name, report in reports.items()}).values()
        return aliases["best_quality"].run_id

    assert won() == "fp16"  # although fp8's logits come nearer to those of its own weights

    reports["fp16"]["quality"] = None
    assert won() == "int8_weights"

    for report in reports.values():
        report["quality"] = None
    assert won() == "fp8"


def test_the_picture_of_quality_is_of_models_with_real_weights_alone_and_names_every_row() -> None:
    def picture(weights: str) -> str | None:
        made = [copy.deepcopy(report) for report in SWEPT.values()]
        for report in made:
            report["config"]["model"]["weights"] = weights
        kept = [Found(upgraded(report), str(i)) for i, report in enumerate(made)]
        environment = made[0]["environment"]
        return results.quality_picture(Figures(Measured(stack_of(environment), environment, kept), older=False))

    assert picture("random") is None
    drawn = picture("pretrained")
    assert drawn is not None
    said = [each.text or "" for each in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert any(each.endswith("  int8_weights: 0.800 ms, +0.40 %") for each in said)  # what all share is said once
    assert "Every row: detect_causal." in said
    assert any("int4_weights: 800 MB, +9.00 %" in each for each in said) and "lost more than is allowed" in said
    assert drawn.count("<circle") == 2 * len(SWEPT) and drawn == picture("pretrained")
