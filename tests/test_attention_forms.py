"""Models whose attention transformers only writes out: what becomes of it, and that it stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_families import CPU, Model, loaded, settings
from tiny import program_of
from torch import Tensor

from benchmarks import families
from passes.errors import RunError, UserError
from passes.graph.rewrite import rewrite
from passes.proof.calls import written_out
from pipeline.config.schema import GenerateShape, ModelConfig
from pipeline.engine import programs, sections, unfused
from pipeline.model import load
from pipeline.model.attention import plain_attention
from pipeline.model.limits import check_fit
from pipeline.model.rotary import check_crossing, turn_of
from pipeline.private.of_transformers import attention_of, looks_attention_up
from pipeline.trace import call_form
from pipeline.trace.call_form import CallForm


def made(name: str) -> load.LoadedModel:
    """The tiny model of the table of families."""
    config = ModelConfig(name, weights="random", architecture=families.described(name))
    return load.load(config, "fp32", CPU, 0, lambda _: None)


def prompt(model: load.LoadedModel, *more: str) -> Any:
    """Its program for a prompt of 2 to 40 tokens, whose logits are asked for at every place; with the inputs ``more``
    beside the tokens."""
    config = settings("llama")
    config.shape.min, config.shape.max = 2, 40
    config.model.inputs = ["input_ids", *more]
    return call_form.trace(CallForm(model.model, "all"), config.model, config.shape, CPU).program


def tokens(length: int) -> Tensor:
    return torch.arange(length)[None] % 90 + 3


def test_sinks_are_a_key_of_their_own_and_masks_stay_proved() -> None:
    model = made("gpt_oss")
    with torch.no_grad():
        for layer in model.model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([-3.0, 0.0, 2.0, 9.0]))
    assert attention_of(model.model) == "eager"

    done = rewrite(prompt(model), "detect_causal", "mask", needed=False)

    assert attention_of(model.model) == "eager"
    assert sorted(call.mask for call in done.calls) == ["arbitrary", "causal_lower_right"]
    assert done.written_out == []
    queries = [node.args[0].meta["val"] for node in done.program.graph.nodes if "native" in str(node.target)]
    assert [each.shape[-1] for each in queries] == [24, 24]
    for length in (2, 16, 17, 40):  # the window is 16
        ids = tokens(length)
        torch.testing.assert_close(done.program.module()(input_ids=ids), model.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_mask_behind_sinks_that_padding_keeps_stays() -> None:
    """Whether it could go was asked after the call had been written anew, of a call that was no longer there.  It could
    not: that every row sees a key is proved of a mask at the lower right, and not taken on somebody's word."""
    program = prompt(made("gpt_oss"), "attention_mask")

    kept = rewrite(program, "detect_causal", "mask", needed=False)

    assert [(call.conditions, call.could_go) for call in kept.calls if call.conditions] == [(("no_padding",), False)]
    assert [call.action for call in kept.calls] == ["native_mask"] * 2


@pytest.mark.parametrize("name", ["gemma2", pytest.param("bloom", marks=pytest.mark.slow),
                                  pytest.param("mpt", marks=pytest.mark.slow)])  # fmt: skip
def test_attention_that_has_no_other_form_stays_written_out_and_is_named(name: str) -> None:
    model = made(name)
    done = rewrite(prompt(model), "detect_causal", "mask", needed=False)

    layers = model.model.config.num_hidden_layers
    assert (done.calls, len(done.written_out)) == ([], layers)
    (note,) = programs.dropped(done, settings("llama").strategy)
    assert f"written out by the model itself ({layers} of its layers)" in note
    with pytest.raises(RunError, match="require_fused=true: the model writes its attention out itself"):
        unfused.refuse({}, {"engine": sections.attention_of(done)})
    for length in (3, 17, 40):
        ids = tokens(length)
        torch.testing.assert_close(done.program.module()(input_ids=ids), model.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_softmax_that_weighs_no_rows_is_no_attention() -> None:
    def chosen(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).softmax(-1).topk(2).values

    def attended(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).softmax(-1, dtype=torch.float32).to(x.dtype)[..., :-1] @ w[:-1]

    x, w = torch.randn(3, 4), torch.randn(4, 4)
    assert written_out(program_of(chosen, x, w).graph_module) == []
    assert len(written_out(program_of(attended, x, w).graph_module)) == 1


def test_a_decoder_that_never_asks_keeps_the_attention_that_it_writes_out() -> None:
    """GIT's class can be told, and its decoder adds what it is given: a bool mask gave the keys that a query may see 1
    more each, and hid none."""
    model = made("git")
    assert looks_attention_up(type(model.model)) and attention_of(model.model) == "eager"
    program = prompt(model, "attention_mask").module()
    for length in (3, 17, 40):
        inputs = {"input_ids": tokens(length), "attention_mask": (torch.arange(length) >= length // 3).long()[None]}
        expected = model.model(**inputs).logits
        torch.testing.assert_close(program(**inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_model_with_attention_of_its_own_class_is_left_alone() -> None:
    model = Model(lambda x: x).model
    with plain_attention(model):
        assert attention_of(model) == "sdpa"
    assert attention_of(model) == "sdpa"


# Rotary factors that change with the length


def test_factors_are_chosen_by_the_length_in_the_program_itself() -> None:
    model = made("phi3 (longrope)")
    program = rewrite(prompt(model), "detect_causal", "mask").program.module()
    assert turn_of(model.model.config) == 24
    for length in (3, 24, 25, 40, 24, 3):  # back and forth: nothing is kept from one length to the next
        ids = tokens(length)
        expected = model.model(ids).logits
        torch.testing.assert_close(program(input_ids=ids), expected, rtol=1e-4, atol=1e-5)
    longer = program(input_ids=tokens(25))[:, :24]
    assert (longer - program(input_ids=tokens(24))).abs().max() > 1e-3, "the factors differ, or nothing was tried"


def test_a_generation_that_crosses_the_turn_is_refused_before_anything_is_built() -> None:
    config, model = settings("llama"), made("phi3 (longrope)")
    config.shape.max = 40
    for length, new in ((20, 5), (24, 1)):
        with pytest.raises(UserError, match=r"output_length=\d+: .* crosses 24, .* begin with a prompt of at least 25"):
            check_fit(model, config.shape, GenerateShape(1, length, new), 0)
    for length, new in ((20, 4), (25, 8)):
        check_fit(model, config.shape, GenerateShape(1, length, new), 0)
    with pytest.raises(UserError, match=r"shape.kind=static: sequences of up to 24 tokens"):
        check_fit(model, config.shape, None, 0, one_length=True)
    check_crossing(None, 20, 30, "x")


def test_a_model_with_one_set_of_factors_has_no_turn() -> None:
    assert turn_of(loaded("mixtral").model.config) is None


@pytest.mark.parametrize(("longest", "room"), [(20, 24), (40, 64)])
def test_a_cache_holds_no_sequence_that_crosses(longest: int, room: int) -> None:
    config, model = settings("llama", "in_engine"), made("phi3 (longrope)")
    config.shape.max = longest
    cache = programs.cache_of(model.model, config.cache, config.shape, None)
    assert cache is not None and (cache.longest, cache.turn) == (room, 24)
