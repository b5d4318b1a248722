"""The table of families: what is kept is what the document says, and a small part of it is run again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import family_table
from benchmarks.families import NAMED, names
from benchmarks.family_runs import (
    CRASHED,
    FORMS,
    LATE,
    NONE,
    REFUSED,
    RIGHT,
    STOPPED,
    WRONG,
    Row,
    _found,
    _outcome,
    row,
    to_json,
)
from benchmarks.family_table import DOCUMENT, README, in_a_process, in_short, markdown, read, slow, standing, wanted


def test_the_document_and_the_readmes_line_say_what_is_kept() -> None:
    rows = read()
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(rows)
    assert in_short(rows) in README.read_text(encoding="utf-8")


def test_every_named_family_was_run_and_none_is_wrong_or_crashes() -> None:
    rows = read()
    assert {family for family, _ in rows} >= set(NAMED) and {family for family, _ in rows} <= set(names())
    for (family, form), made in rows.items():
        assert made.outcome in (RIGHT, REFUSED, STOPPED, NONE), f"{family}, {form}: {made.reason}"
        assert bool(made.reason) == (made.outcome != RIGHT) and "\n" not in made.reason
        if made.outcome == RIGHT:
            assert made.cases >= 3 and (made.tokens == 8) == (form == "generation")
            assert made.error is not None and made.allowed is not None and made.error <= made.allowed


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", "prompt"),
        ("mamba", "generation"),  # refused before anything is built
        pytest.param("gpt_oss", "generation", marks=pytest.mark.slow),
        pytest.param("llama4_text", "generation", marks=pytest.mark.slow),
        pytest.param("phi3 (longrope)", "generation", marks=pytest.mark.slow),
        pytest.param("falcon (alibi)", "generation", marks=pytest.mark.slow),
    ],
)
def test_a_row_that_is_run_again_says_the_same(family: str, form: str) -> None:
    again, kept = row(family, form), read().get((family, form))
    assert again.outcome == (RIGHT if family != "mamba" else REFUSED), again.reason
    if kept is not None:
        measured = {"seconds": 0.0, "versions": "", "error": None, "allowed": None}
        assert replace(again, **measured) == replace(kept, **measured)


def test_sizes_that_transformers_refuses_are_a_row_with_its_words() -> None:
    made = row("no such family", "prompt")
    assert made.outcome == NONE and "no such family" in made.reason


@pytest.mark.slow  # starts a server of processes
def test_a_row_that_takes_too_long_is_one() -> None:
    made = in_a_process("llama", "prompt", limit_s=0.01)
    assert (made.outcome, made.reason) == (LATE, "longer than 0 s")


def report(**failure: object) -> dict[str, object]:
    return {"failure": {"stage": "export", "kind": "export", "message": "why", "traceback": None} | failure}


def test_what_a_run_ends_with_is_told_apart() -> None:
    assert _outcome({"failure": None}) == (RIGHT, "", "")
    assert _outcome(report()) == (REFUSED, "why", "export")
    assert _outcome(report(stage="interpret", kind="unsupported_op")) == (STOPPED, "why", "interpret")
    assert _outcome(report(stage="verify", kind="accuracy")) == (WRONG, "why", "verify")
    assert _outcome(report(kind="KeyError", traceback="Traceback")) == (CRASHED, "KeyError: why", "export")


FAST = Row("llama", "prompt", RIGHT, masks={"prompt": ["2 x causal (proved): native_causal"]}, cases=3)


def test_what_has_no_fast_kernel_is_named() -> None:
    assert slow(FAST) == []
    window = replace(FAST, masks={"prompt": ["1 x sliding_window (proved): native_mask"], "step": []}, written_out=1)
    assert slow(window) == ["prompt: sliding window, mask read", "step: attention written out by the model"]
    assert slow(replace(FAST, unfused=["prompt: fp32, no mask"])) == ["prompt: fp32, no mask, no fused kernel"]
    refused = Row("llama", "generation", REFUSED, "for a reason")
    assert standing([FAST, window]) == "slower" and standing([window, refused]) == REFUSED
    document = markdown({("llama", "prompt"): window, ("llama", "generation"): refused})
    assert "| llama | prompt: sliding window, mask read; step: attention" in document
    assert "| not run | refused (1) |" in document and "1. `for a reason`" in document


def test_rows_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    family_table.write({("llama", "prompt"): FAST}, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [to_json(FAST)]
    rows = read(path)
    assert rows == {("llama", "prompt"): FAST}
    asked = {"only": "llama", "again": ""}
    missing = list(wanted(type("Asked", (), asked), rows))  # type: ignore[arg-type]
    assert missing == [("llama", form) for form in family_table.ORDER if form != "prompt"]
    assert len(list(wanted(type("Asked", (), asked | {"again": RIGHT}), rows))) == len(FORMS)  # type: ignore[arg-type]


def test_a_report_without_a_cache_has_one_program() -> None:
    call = {"mask": "causal", "proof": "proved", "action": "native_causal"}
    found = _found({"attention": {"calls": [call, call]}, "engine": None, "decode": None, "verify": None})
    assert found == {"masks": {"prompt": ["2 x causal (proved): native_causal"]}, "written_out": 0, "unfused": []}
