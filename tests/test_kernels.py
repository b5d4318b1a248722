"""The kernel map: its forms build, and the tables in docs/results.md are those of its raw rows."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import chunk_attention, kernel_forms, kernels, prompt_attention, step_forms

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "benchmarks" / "profiles" / "h100_rtx_1_6"
GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model ``qwen3_tiny``, with a norm of queries and keys."""
    monkeypatch.setitem(kernel_forms.HEADS, "qwen3_tiny", (4, 2, 16))
    monkeypatch.setitem(kernel_forms.SIZES, "qwen3_tiny", (64, 128, 64, 96, 128))
    monkeypatch.setitem(step_forms.STEP_LAYERS, "qwen3_tiny", 1)


BUILT = ("plain.native.-", "merged.wide.jg", "merged@x4.wide@4.jwbrhi")
"""Of the forms those whose parts are in the others too."""


@pytest.mark.parametrize(
    "form", [form if form in BUILT else pytest.param(form, marks=pytest.mark.slow) for form in step_forms.STEP]
)
def test_every_form_of_a_layer_builds_and_on_a_gpu_is_right(form: str) -> None:
    row = {"kind": "step", "model": "qwen3_tiny", "form": form, "size": 128}
    data = step_forms.step_net("qwen3_tiny", form, 128).build()
    inputs, wanted = step_forms.step_inputs("qwen3_tiny", form, 128)
    assert len(data) > 10_000 and wanted.isfinite().all() and {"x", "position", "k0", "v0"} <= set(inputs)
    if GPU:
        kernels.run_case(row, data, nullcontext())
        assert row["relative_error"] < kernels.WRONG


@pytest.mark.parametrize("form", prompt_attention.FORMS)
def test_every_form_of_a_prompts_attention_builds(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_attention, "LENGTH", 64)
    assert len(prompt_attention.build("qwen3_tiny", form)) > 10_000
    if GPU:
        assert prompt_attention.row_of("qwen3_tiny", form)["relative_error"] < kernels.WRONG


@pytest.mark.parametrize("form", [*chunk_attention.FORMS, "whole"])
def test_every_form_of_a_chunks_attention_builds(form: str) -> None:
    assert len(chunk_attention.build("qwen3_tiny", form, 128, 512)) > 10_000
    if GPU:
        assert chunk_attention.row_of("qwen3_tiny", form, 256, 256, 512)["relative_error"] < kernels.WRONG


@pytest.mark.parametrize(("raw", "above"), [("kernels.jsonl", 10), ("steps.jsonl", 10)])
def test_the_tables_of_the_documentation_are_those_of_the_raw_rows(raw: str, above: int) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    made = kernels.tables(PROFILES / raw)
    assert made.count("|\n") > above
    for line in made.splitlines():
        assert line in page
