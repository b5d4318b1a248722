"""Generation without a cache at one length: what stands behind the last token must change nothing, and is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from conftest import save_tiny_llama
from runs import GPU, do, failure
from torch import Tensor

from passes.errors import UserError
from passes.graph.rewrite import rewrite
from pipeline.__main__ import compose_config
from pipeline.config.schema import ShapeConfig
from pipeline.engine.session import GraphSession
from pipeline.generate.without_cache import OneLengthGenerator, at_one_length
from pipeline.trace.call_form import CallForm, Traced, trace

WHOLE, LENGTH, NEW = 24, 9, 12
SETTINGS = ["cache=none", "shape=static", "shape.max=24", "model.inputs=[input_ids,last]", "benchmark=generate"]
GENERATE = [
    *SETTINGS,
    "benchmark.shapes=[]",
    "benchmark.generate.input_length=9",
    "benchmark.generate.output_length=12",
]


def traced(name: str, batch: int = 1) -> Traced:
    config = tiny.config(name)
    config.inputs = ["input_ids", "last"]
    form = CallForm(tiny.model(name), "last")
    return trace(form, config, ShapeConfig("static", batch, WHOLE, WHOLE, WHOLE), torch.device("cpu"))


def session_of(program: Traced, strategy: str = "lowering", unproven: str | None = "keep") -> GraphSession:
    rewritten = rewrite(program.program, strategy, unproven, [])
    return GraphSession(rewritten.program.module(), tuple(spec.name for spec in program.inputs))


def generator(session: GraphSession) -> OneLengthGenerator:
    return OneLengthGenerator(session, WHOLE, 128, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_it_generates_what_hugging_face_does(name: str) -> None:
    made = generator(session_of(traced(name)))
    for seed in (0, 1):  # the second over what the first left behind its prompt
        prompt = tiny.tokens(1, LENGTH, seed)
        expected = tiny.model(name).generate(
            prompt, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None, pad_token_id=0
        )
        made.prepare(prompt, NEW)
        assert made.tokens().tolist() == expected[:, LENGTH:].tolist()
    assert made.generation == 1, "bound once, whatever the prompt"


def test_the_last_new_token_may_stand_behind_the_end() -> None:
    made = generator(session_of(traced("llama")))
    prompt = tiny.tokens(1, WHOLE - 3)
    made.prepare(prompt, 4)
    assert made.tokens().shape == (1, 4)
    with pytest.raises(UserError, match=f"5 more: above shape.max={WHOLE}"):
        made.prepare(prompt, 5)
    with pytest.raises(UserError, match="one prompt at a time"):
        made.prepare(tiny.tokens(2, LENGTH), NEW)


def test_each_row_of_a_batch_has_a_place_of_its_own() -> None:
    program = traced("llama", batch=3)
    tokens, last = tiny.tokens(3, WHOLE), torch.tensor([23, 4, 11])
    with torch.no_grad():
        expected = CallForm(tiny.model("llama"), "all")(tokens)[range(3), last]
        got = program.program.module()(input_ids=tokens, last=last)
    assert got.shape == (3, 1, 128)
    torch.testing.assert_close(got[:, 0], expected)


def test_shorter_sequences_are_judged_with_something_behind_them() -> None:
    module = traced("llama").program.module()
    seen: list[Tensor] = []

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        seen.append(inputs["input_ids"])
        return module(**inputs)

    tokens = tiny.tokens(1, 5)
    got = at_one_length(forward, WHOLE)({"input_ids": tokens, "last": torch.tensor([4])})
    assert seen[0].shape == (1, WHOLE)
    with torch.no_grad():
        torch.testing.assert_close(got, CallForm(tiny.model("llama"), "last")(tokens))


def test_a_run_is_judged_at_many_places_of_its_one_length(store: str, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny-llama")
    settings = [setting for setting in SETTINGS if not setting.startswith("benchmark")]
    outcome = do(store, tmp_path / "out", folder, *settings, "benchmark=none", "model.logits=last")

    report = outcome.report
    assert report["status"] == ("ok" if GPU else "not_executed"), failure(outcome)
    assert [case["length"] for case in report["verify"]["cases"]] == [1, 7, 24]
    assert report["attention"]["summary"]["by_action"] == {"native_causal": 2}
    assert report["attention"]["summary"]["narrowed"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU that PyTorch can use")
def test_its_step_is_one_graph_and_its_tokens_are_pytorchs(store: str, tmp_path: Path) -> None:
    outcome = do(store, tmp_path / "out", save_tiny_llama(tmp_path / "tiny-llama"), *GENERATE)

    assert outcome.report["status"] == "ok", failure(outcome)
    assert outcome.report["benchmark"]["generate"]["cuda_graph"] is True
    assert outcome.report["verify"]["generation"]["passed"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.inputs=[input_ids,attention_mask,last]"], "last goes with input_ids alone"),
        (["model.inputs=[input_ids,last]"], "model.logits=last"),
        (["model.inputs=[input_ids,last]", "cache=in_engine"], "leave last out"),
        ([*GENERATE, "shape.max=19"], "shape.max=20"),
        ([*GENERATE, "model.inputs=[input_ids]"], r"model.inputs=\[input_ids,last\]"),
        ([*SETTINGS, "benchmark=none", "model.logits=last", "verify.lengths=[25]"], "verify.lengths=25"),
    ],
)
def test_what_contradicts_it_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose_config(settings)
