"""Rewritten programs compute what PyTorch computes, and the records say what was done and why."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from passes.errors import RunError
from passes.graph import ops
from passes.graph.rewrite import DECOMPOSITIONS, in_aten, rewrite
from passes.graph.rewritten import Rewritten
from passes.graph.writing import SDPA
from passes.proof.calls import find_calls, unrepeated
from passes.proof.sizes import symbol_ranges
from pipeline.model.load import load_reference
from pipeline.verify.logits import FACTOR

PADDED = ("input_ids", "attention_mask")
LENGTH = 9
# strategy, unproven, action of a call proved causal, action of one that is not
SETTINGS = [
    ("detect_causal", "mask", "native_causal", "native_mask"),
    ("detect_causal", "decompose", "native_causal", "decomposed"),
    ("mask_input", None, "native_mask", "native_mask"),
    ("lowering", "keep", "rewritten_causal", "native_mask"),
    ("decompose", None, "decomposed", "decomposed"),
    ("upstream", None, "untouched", "untouched"),
]
EACH_SETTING = pytest.mark.parametrize(
    ("strategy", "unproven", "proved", "unproved"), SETTINGS, ids=lambda value: str(value)
)


@functools.cache
def in_float64(name: str) -> Any:
    return load_reference(tiny.config(name), "fp32", tiny.CPU, 0)


def assert_as_pytorch(graph: torch.nn.Module, name: str, inputs: dict[str, Tensor]) -> None:
    """Logits as near to float64 as PyTorch's own, up to the factor that the verification allows."""
    with torch.no_grad():
        truth, own = in_float64(name)(**inputs).logits, tiny.model(name)(**inputs).logits
        got = graph(**inputs)
    assert got.shape == own.shape and got.isfinite().all()
    own_error, error = ((logits - truth).norm() / truth.norm() for logits in (own, got))
    assert error <= FACTOR * own_error


def targets(rewritten: Rewritten) -> list[Any]:
    return [node.target for node in rewritten.program.graph.nodes]


def padded_batch() -> tuple[dict[str, Tensor], Tensor]:
    """Two rows, the first with three positions of left padding, and where the tokens are real."""
    real = torch.ones(2, LENGTH, dtype=torch.int64)
    real[0, :3] = 0
    return {"input_ids": tiny.tokens(2, LENGTH), "attention_mask": real}, real.bool()


# -- the same logits, whatever the strategy ----------------------------------------------------------


@EACH_SETTING
def test_a_causal_model_is_computed_as_pytorch_does(
    strategy: str, unproven: str | None, proved: str, unproved: str
) -> None:
    rewritten = tiny.rewritten(strategy, unproven, "llama")
    assert {call.action for call in rewritten.calls} == {proved}
    graph = rewritten.program.module()
    for length in (1, 2, LENGTH, 64):
        assert_as_pytorch(graph, "llama", {"input_ids": tiny.tokens(1, length)})


@pytest.mark.parametrize("name", [pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"])
@pytest.mark.parametrize(
    ("strategy", "unproven"), [("detect_causal", "mask"), ("lowering", "keep"), ("decompose", None)]
)
def test_the_other_shipped_architectures_are_too(name: str, strategy: str, unproven: str | None) -> None:
    assert_as_pytorch(
        tiny.rewritten(strategy, unproven, name).program.module(), name, {"input_ids": tiny.tokens(1, LENGTH)}
    )


@EACH_SETTING
def test_left_padding_is_respected(strategy: str, unproven: str | None, proved: str, unproved: str) -> None:
    rewritten = tiny.rewritten(strategy, unproven, "llama", inputs=PADDED, batch=2)
    assert [(call.mask, call.depends_on, call.action) for call in rewritten.calls] == [
        ("padding", ("attention_mask",), unproved)
    ] * 2
    # At padding too, whose rows see no key.
    assert_as_pytorch(rewritten.program.module(), "llama", padded_batch()[0])


@EACH_SETTING
def test_packed_positions_are_respected(strategy: str, unproven: str | None, proved: str, unproved: str) -> None:
    rewritten = tiny.rewritten(strategy, unproven, "llama", inputs=("input_ids", "position_ids"))
    assert [(call.proof, call.action) for call in rewritten.calls] == [("proved", unproved)] * 2
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    assert_as_pytorch(
        rewritten.program.module(), "llama", {"input_ids": tiny.tokens(1, LENGTH), "position_ids": packed}
    )


def test_a_window_within_the_range_is_respected() -> None:
    rewritten = tiny.rewritten("detect_causal", "mask", "mistral", sliding_window=63)
    assert [call.action for call in rewritten.calls] == ["native_window"]
    inputs = {"input_ids": tiny.tokens(1, 64)}
    with torch.no_grad():
        windowed = tiny.model("mistral", sliding_window=63)(**inputs).logits
    torch.testing.assert_close(tiny.logits(rewritten.program, **inputs), windowed, rtol=1e-5, atol=1e-6)
    wider = tiny.model("mistral", sliding_window=64)(**inputs).logits
    assert (wider - windowed).abs().max() > 1e-4  # one key of one query


def test_a_window_is_handed_over_as_a_mask_where_that_was_asked_for() -> None:
    rewritten = tiny.rewritten("mask_input", None, "mistral", sliding_window=63)
    assert [call.action for call in rewritten.calls] == ["native_mask"]
    inputs = {"input_ids": tiny.tokens(1, 64)}
    with torch.no_grad():
        windowed = tiny.model("mistral", sliding_window=63)(**inputs).logits
    assert torch.equal(tiny.logits(rewritten.program, **inputs), windowed)


def test_attention_may_be_laid_out_in_any_way_before_a_view_of_what_is_computed_from_it() -> None:
    """A gate between attention and its output (Beam, LFM 3): the product has attention's strides."""

    def gated(x: Tensor) -> Tensor:
        heads = x.view(1, -1, 4, 16).transpose(1, 2)
        out = scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2)
        return (out * x.view(1, -1, 4, 16).sigmoid()).view(1, -1, 64)

    x = torch.randn(1, 9, 64)
    program = tiny.program_of(gated, x, dynamic=({1: tiny.length(2, 12)},))
    made = in_aten(rewrite(program, "detect_causal", "mask").program)
    torch.testing.assert_close(made.module()(x), gated(x))


# -- what is written into the graph and the records --------------------------------------------------


def test_records_say_what_was_proved_and_what_was_done() -> None:
    rewritten = tiny.rewritten("detect_causal", "mask", "llama")
    first, second = rewritten.calls
    assert (first.index, second.index) == (0, 1) and first.op == "aten.scaled_dot_product_attention.default"
    assert (first.mask, first.proof, first.unproved, first.native_gqa) == ("causal", "proved", False, True)
    assert first.reason.startswith("causal proved")
    section = rewritten.describe()
    assert section["summary"]["by_action"] == {"native_causal": 2} and section["summary"]["by_mask"] == {"causal": 2}
    assert section["summary"]["proof_seconds"] == first.seconds > 0 == second.seconds


def test_lowering_leaves_torchs_own_words_and_no_mask_graph() -> None:
    found = targets(tiny.rewritten("lowering", "keep", "llama"))
    aten = torch.ops.aten
    assert found.count(SDPA) == 2 and ops.NATIVE not in found
    assert not {aten.le.Tensor, aten.cumsum.default, aten.diff.default, aten.__and__.Tensor} & set(found)


def test_detect_causal_keeps_the_mask_beside_its_claim_as_evidence() -> None:
    rewritten = tiny.rewritten("detect_causal", "mask", "llama")
    natives = [node for node in rewritten.program.graph.nodes if node.target is ops.NATIVE]
    assert [node.args[4] for node in natives] == ["upper_left"] * 2
    assert all(node.args[3] is not None for node in natives)


def test_a_false_claim_about_a_mask_is_refused_when_the_graph_runs() -> None:
    rewritten = tiny.rewritten("detect_causal", "mask", "llama", inputs=PADDED, batch=2)
    for node in rewritten.program.graph.nodes:
        if node.target is ops.NATIVE:
            node.args = (*node.args[:4], "upper_left", node.args[5])
    rewritten.program.graph_module.recompile()
    inputs, _ = padded_batch()
    with pytest.raises(AssertionError, match="the proof is wrong"):
        tiny.logits(rewritten.program, **inputs)
    tiny.logits(rewritten.program, **inputs | {"attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)})


def test_force_drops_the_mask_says_so_and_changes_padded_logits() -> None:
    rewritten = tiny.rewritten("lowering", "force", "llama", inputs=PADDED, batch=2)
    for call in rewritten.calls:
        assert (call.action, call.unproved, call.proof) == ("rewritten_causal", True, "unproved")
        assert "unproved" in call.reason and call.depends_on == ("attention_mask",)
    inputs, real = padded_batch()
    with torch.no_grad():
        right = tiny.model("llama")(**inputs).logits
    wrong = tiny.logits(rewritten.program, **inputs)
    assert (wrong - right)[real].norm() > 0.1 * right[real].norm()
    assert_as_pytorch(rewritten.program.module(), "llama", inputs | {"attention_mask": torch.ones(2, LENGTH).long()})


@pytest.mark.parametrize("strategy", ["detect_causal", "lowering"])
def test_error_ends_the_run_at_the_first_unproved_mask(strategy: str) -> None:
    with pytest.raises(RunError, match="attention_mask") as error:
        tiny.rewritten(strategy, "error", "llama", inputs=PADDED, batch=2)
    assert error.value.kind == "unproven"
    assert tiny.rewritten(strategy, "error", "llama").calls[0].proof == "proved"


def test_a_graph_without_attention_ends_the_run() -> None:
    program = tiny.program_of(lambda x: x.softmax(-1) @ x, torch.zeros(1, 2, 4, 4))
    with pytest.raises(RunError, match="attn_implementation=sdpa") as error:
        rewrite(program, "detect_causal", "mask")
    assert error.value.kind == "no_attention"


# -- grouped-query attention -------------------------------------------------------------------------


def repeat_kv(x: Tensor, group: int) -> Tensor:
    return x[:, :, None].expand(x.shape[0], x.shape[1], group, *x.shape[2:]).flatten(1, 2)


def tiled(x: Tensor, group: int) -> Tensor:
    return x[:, None].expand(x.shape[0], group, *x.shape[1:]).flatten(1, 2)


@pytest.mark.parametrize(("spread", "native"), [(repeat_kv, True), (tiled, False)])
def test_only_the_repetition_of_grouped_query_attention_is_taken_for_it(spread: Any, native: bool) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, spread(k, 3), spread(v, 3), is_causal=True)

    inputs = [torch.randn(1, heads, 7, 16, generator=torch.Generator().manual_seed(heads)) for heads in (6, 2, 2)]
    dynamic = tuple({2: tiny.length()} for _ in inputs)
    program = tiny.program_of(attention, *inputs, dynamic=dynamic)
    (call,) = find_calls(program.graph_module)
    assert (unrepeated(call.key, symbol_ranges(program)) is not None) == native
    rewritten = rewrite(program, "detect_causal", "mask")
    assert rewritten.calls[0].native_gqa == native
    got = rewritten.program.module()(*inputs)
    torch.testing.assert_close(got, attention(*inputs))
    assert not torch.allclose(repeat_kv(inputs[1], 3), tiled(inputs[1], 3))


@EACH_SETTING
def test_a_call_that_asks_for_gqa_itself_stays_right(
    strategy: str, unproven: str | None, proved: str, unproved: str
) -> None:
    def attention(q: Tensor, k: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    inputs = [torch.randn(1, heads, 7, 16, generator=torch.Generator().manual_seed(heads)) for heads in (6, 2)]
    rewritten = rewrite(tiny.program_of(attention, *inputs), strategy, unproven)
    got = rewritten.program.run_decompositions(DECOMPOSITIONS).module()(*inputs)
    torch.testing.assert_close(got, attention(*inputs))


# -- the project's own ops ---------------------------------------------------------------------------


def qkv(dtype: torch.dtype, length: int = 4, keys: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, n, 16, generator=generator).to(dtype) for n in (length, keys, keys)]


@pytest.mark.parametrize(
    ("kind", "length"), [("upper_left", 4), ("lower_right", 4), ("upper_left", 2), ("lower_right", 2)]
)
def test_the_native_op_computes_from_its_claim_and_checks_the_mask_against_it(kind: str, length: int) -> None:
    q, k, v = qkv(torch.float32, length)
    mask = ops.causal_mask(kind, length, 4, tiny.CPU)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.5)
    for given in (None, mask, mask.expand(1, 2, -1, -1)):
        torch.testing.assert_close(ops.native(q, k, v, given, kind, 0.5), right)
    other = mask.clone()
    other[-1, 0] = False
    with pytest.raises(AssertionError, match="the proof is wrong"):
        ops.native(q, k, v, other, kind, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_written_out_row_without_any_key_is_zero_as_in_pytorch(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1, :] = False
    low = q.abs() * -k[:, :, :1].sign() * 20  # fp16: the lowest value plus one of these scores is minus infinity
    for query in (q, low):
        got = ops.written_out(query, k[:, :, :1].expand_as(k), v, mask, False, 1.0)
        assert got.isfinite().all()
        assert torch.equal(got[:, :, 1], torch.zeros_like(got[:, :, 1])) and got[:, :, 0].any()


def test_the_written_out_form_takes_bool_float_and_causal_masks() -> None:
    q, k, v = qkv(torch.float64)
    allowed = ops.causal_mask("upper_left", 4, 4, tiny.CPU)
    bias = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    for mask, is_causal in ((allowed, False), (bias, False), (None, True)):
        torch.testing.assert_close(ops.written_out(q, k, v, mask, is_causal, 0.3), right)
