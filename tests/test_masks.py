"""Which masks are recognised, proved against brute force over every small length, and which are not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.export import ExportedProgram

from passes import classify
from passes.proof.calls import find_calls
from passes.proof.masks import Proof, prover_of

LONGEST = 12


def proofs(program: ExportedProgram) -> list[Proof]:
    prover = prover_of(program)
    return [prover.prove(call) for call in find_calls(program.graph_module)]


def proof(name: str, **how: Any) -> Proof:
    first, *others = proofs(tiny.traced(name, **how).program)
    assert all(replace(other, seconds=first.seconds) == first for other in others)
    return first


# -- Hugging Face's own masks ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_the_masks_of_the_shipped_models_are_proved_causal(name: str, static: bool) -> None:
    found = proof(name, lengths=(64, 64) if static else (1, 64))
    assert (found.mask.name, found.status, found.depends_on, found.causal) == ("causal", "proved", (), True)
    assert list(found.profile.values()) == ([] if static else [(1, 64)])


def test_an_attention_mask_makes_padding_that_may_not_be_dropped() -> None:
    found = proof("llama", inputs=("input_ids", "attention_mask"), batch=2)
    assert (found.mask.name, found.status, found.depends_on) == ("padding", "proved", ("attention_mask",))
    assert not found.causal and not found.void


def test_given_position_ids_make_packed_segments_that_may_not_be_dropped() -> None:
    found = proof("llama", inputs=("input_ids", "position_ids"))
    assert (found.mask.name, found.status, found.depends_on) == ("packed", "proved", ("position_ids",))
    assert found.conditions == ("contiguous_positions",)
    assert found.counterexample is not None and found.counterexample.inputs == {"position_ids": [[0, 0]]}
    assert not found.causal and not found.void


def test_a_window_beside_padding_has_no_class_and_needs_no_name_to_be_kept() -> None:
    found = proof("mistral", inputs=("input_ids", "attention_mask"), sliding_window=6)
    assert (found.mask.name, found.status, found.conditions) == ("arbitrary", "not_proved", ())
    wide = proof("mistral", inputs=("input_ids", "attention_mask"), sliding_window=64)
    assert (wide.mask.name, wide.status, wide.conditions) == ("padding", "proved", ("no_padding",))


@pytest.mark.parametrize(
    ("inputs", "kept", "conditions"),
    [
        (("attention_mask",), "padding", {"no_padding"}),
        (("position_ids",), "packed", {"contiguous_positions"}),
        (("attention_mask", "position_ids"), "padding", {"no_padding"}),
    ],
)
def test_an_assumption_makes_a_mask_causal_and_is_named(inputs: Any, kept: str, conditions: set[str]) -> None:
    program = tiny.traced("llama", inputs=("input_ids", *inputs)).program
    before = str(program.graph)
    for assume in ([], ["no_padding"], ["contiguous_positions"], ["no_padding", "contiguous_positions"]):
        (_, found), _ = classify(program, assume)
        assumed = conditions.issubset(assume)
        assert (found.mask.name, found.status) == (("causal", "assumed") if assumed else (kept, "proved"))
        assert found.causal == assumed and set(found.conditions) == conditions
    assert str(program.graph) == before


def test_a_classification_reads_as_text() -> None:
    text = str(classify(tiny.traced("llama", inputs=("input_ids", "position_ids")).program))
    assert text.count("packed, proved") == 1 and "scaled_dot_product_attention and 1 more" in text
    assert "may be dropped where positions rise by one" in text
    assert "key 0 would be visible to query 1 when position_ids = [[0, 0]]" in text


def test_a_window_one_shorter_than_the_range_is_a_window() -> None:
    found = proof("mistral", sliding_window=63)
    assert (found.mask.name, found.status, found.causal) == ("sliding_window", "proved", False)
    assert "last 63 keys" in found.reason


def test_a_window_as_long_as_the_range_is_causal() -> None:
    assert proof("mistral", sliding_window=64).causal


def test_a_mask_that_layers_share_is_proved_and_timed_once() -> None:
    first, second = proofs(tiny.traced("llama").program)
    assert first.seconds > 0 and second.seconds == 0


# -- masks written by hand ---------------------------------------------------------------------------

Mask = Callable[[int, int], Tensor]  # (queries, keys) -> [queries, keys]


def q(length: int) -> Tensor:
    return torch.arange(length)[:, None]


def k(keys: int) -> Tensor:
    return torch.arange(keys)[None]


def causal(length: int, keys: int) -> Tensor:
    return k(keys) <= q(length)


def lower_right(length: int, keys: int) -> Tensor:
    return k(keys) <= q(length) + (keys - length)


# Name -> the mask, its class for 1..LONGEST queries and as many keys.
SQUARE: dict[str, tuple[Mask, str]] = {
    "k <= q": (causal, "causal"),
    "q >= k": (lambda n, m: q(n) >= k(m), "causal"),
    "k < q + 1": (lambda n, m: k(m) < q(n) + 1, "causal"),
    "q - k < 0, negated": (lambda n, m: ~(q(n) - k(m) < 0), "causal"),
    "lower right of a square": (lower_right, "causal"),
    "where": (lambda n, m: torch.where(k(m) > q(n), False, True), "causal"),
    "window as long as the range": (lambda n, m: (k(m) <= q(n)) & (q(n) - k(m) < LONGEST), "causal"),
    "full": (lambda n, m: torch.ones(n, m, dtype=torch.bool), "full"),
    "full by arithmetic": (lambda n, m: k(m) - q(n) < m, "full"),
    "window": (lambda n, m: (k(m) <= q(n)) & (k(m) > q(n) - 3), "sliding_window"),
    "window one short of the range": (lambda n, m: (k(m) <= q(n)) & (q(n) - k(m) < LONGEST - 1), "sliding_window"),
    "diagonal": (lambda n, m: k(m) == q(n), "sliding_window"),
    "k < q": (lambda n, m: k(m) < q(n), "arbitrary"),
    "k <= q + 1": (lambda n, m: k(m) <= q(n) + 1, "arbitrary"),
    "transposed": (lambda n, m: q(n) <= k(m), "arbitrary"),
    "one row changed": (lambda n, m: (k(m) <= q(n)) & (q(n) != 3), "arbitrary"),
    "one column changed": (lambda n, m: (k(m) <= q(n)) & (k(m) != 2), "arbitrary"),
    "one element more": (lambda n, m: (k(m) <= q(n)) | ((q(n) == 7) & (k(m) == 9)), "arbitrary"),
    "one element less, at the longest only": (
        lambda n, m: (k(m) <= q(n)) & ((q(n) != LONGEST - 1) | (k(m) != 1)), "arbitrary"
    ),
    "prefix": (lambda n, m: (k(m) <= q(n)) | (k(m) < 4), "arbitrary"),
    "chunks": (lambda n, m: (k(m) <= q(n)) & (k(m) // 4 == q(n) // 4), "chunked"),
    "chunks that are longer than the range": (lambda n, m: (k(m) <= q(n)) & (k(m) // 12 == q(n) // 12), "causal"),
    "chunks without causality": (lambda n, m: k(m) // 4 == q(n) // 4, "arbitrary"),
    "chunks from another start": (lambda n, m: (k(m) <= q(n)) & ((k(m) + 1) // 4 == (q(n) + 1) // 4), "arbitrary"),
    "triangle": (lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(), "causal"),
    "triangle above the diagonal": (lambda n, m: ~torch.ones(n, m, dtype=torch.bool).triu(1), "causal"),
    "triangle and a diagonal more": (lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(1), "arbitrary"),
    "a row that sees itself sees something": (
        lambda n, m: causal(n, m) | ~causal(n, m).any(-1, keepdim=True), "causal"
    ),
    "a row that may see nothing": (
        lambda n, m: (k(m) < q(n)) | ~(k(m) < q(n)).any(-1, keepdim=True), "arbitrary"
    ),
    "additive": (lambda n, m: torch.where(causal(n, m), 0.0, -torch.inf), "causal"),
    "additive, the least number": (
        lambda n, m: torch.zeros(n, m).masked_fill(~causal(n, m), torch.finfo(torch.float32).min), "causal"
    ),
    "additive, by multiplication": (
        lambda n, m: (1.0 - causal(n, m).float()) * torch.finfo(torch.float32).min, "causal"
    ),
    "additive, twice the least number": (
        lambda n, m: torch.where(causal(n, m), 0.0, torch.finfo(torch.float32).min) * 2, "causal"
    ),
    "additive, transposed": (lambda n, m: torch.where(causal(n, m), -torch.inf, 0.0), "arbitrary"),
    "additive, a window": (
        lambda n, m: torch.where(causal(n, m) & (k(m) > q(n) - 3), 0.0, -torch.inf), "sliding_window"
    ),
    "additive, but not enough": (lambda n, m: torch.where(causal(n, m), 0.0, -1e4), "bias"),
    "additive, and a little more": (lambda n, m: torch.where(causal(n, m), 0.5, -torch.inf), "bias"),
    "nothing is added": (lambda n, m: torch.zeros(n, m), "full"),
}  # fmt: skip
PREDICATES: dict[str, Mask] = {
    "causal": causal,
    "causal_lower_right": lower_right,
    "full": lambda n, m: torch.ones(n, m, dtype=torch.bool),
}


def attended(mask: Tensor) -> Tensor:
    """Where ``mask`` attends; numbers that are neither 0 nor blocked make it no mask at all."""
    if mask.dtype == torch.bool:
        return mask
    blocked = mask <= torch.finfo(mask.dtype).min
    return mask == 0 if bool((blocked | (mask == 0)).all()) else torch.full_like(blocked, False)


def hand_written(*masks: Mask, offset: int = 0, static: int | None = None) -> list[Proof]:
    """The proofs of ``masks`` on x [1, 2, length, 16] that attends from x[offset:] to x, for length 1..LONGEST
    (offset + 2..LONGEST where there is an offset), or ``static``."""

    def attention(x: Tensor) -> list[Tensor]:
        query = x[:, :, offset:]
        written = [mask(query.shape[2], x.shape[2])[None, None] for mask in masks]
        return [torch.nn.functional.scaled_dot_product_attention(query, x, x, attn_mask=each) for each in written]

    x = torch.zeros(1, 2, 7 if static is None else static, 16)
    dynamic = ({2: tiny.length(offset + 2 if offset else 1, LONGEST)},) if static is None else None
    return proofs(tiny.program_of(attention, x, dynamic=dynamic))


@functools.cache
def of_squares() -> dict[str, Proof]:
    return dict(zip(SQUARE, hand_written(*(mask for mask, _ in SQUARE.values())), strict=True))


@pytest.mark.parametrize("name", SQUARE)
def test_a_hand_written_mask_has_the_class_that_brute_force_finds(name: str) -> None:
    mask, kind = SQUARE[name]
    found = of_squares()[name]
    assert (found.mask.name, found.status) == (kind, "not_proved" if kind in ("arbitrary", "bias") else "proved")
    true_of = {
        each
        for each, predicate in PREDICATES.items()
        if all(torch.equal(attended(mask(n, n)), predicate(n, n)) for n in range(1, LONGEST + 1))
    }
    assert (kind in true_of) if kind in PREDICATES else not true_of


def narrow(length: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(length)[None].to(dtype)


# Masks that an earlier prover called causal or full; none of them is.
ONCE_FALSE: dict[str, Mask] = {
    "reversed difference with a factor": lambda n, m: torch.rsub(k(m), q(n), alpha=2) == 2 * q(n) - k(m),
    "a number that wraps in a narrow type": lambda n, m: (narrow(m, torch.uint8) + 0 * q(n).to(torch.uint8)) != 256,
    "a bound that wraps in a narrow type": lambda n, m: (narrow(m, torch.int32) + 0 * q(n).to(torch.int32)) < 2**32,
    "a quotient by a zero with a sign": lambda n, m: torch.where(
        causal(n, m), 0.0, torch.floor_divide(-torch.ones(n, m), torch.zeros(n, m) * -1.0)
    ),
    "minus infinity as an integer": lambda n, m: torch.where(causal(n, m), 0.0, -torch.inf).to(torch.int64) == 0,
}


@functools.cache
def of_once_false() -> dict[str, Proof]:
    return dict(zip(ONCE_FALSE, hand_written(*ONCE_FALSE.values()), strict=True))


@pytest.mark.parametrize("name", ONCE_FALSE)
def test_what_was_once_proved_falsely_is_not_proved(name: str) -> None:
    found = of_once_false()[name]
    assert not found.causal and not found.void


def test_a_range_that_wraps_in_its_type_is_not_taken_for_its_index() -> None:
    def wraps(n: int, m: int) -> Tensor:
        return torch.arange(m, dtype=torch.int8)[None] <= torch.arange(n, dtype=torch.int8)[:, None]

    assert hand_written(wraps, static=100)[0].causal
    assert not hand_written(wraps, static=300)[0].causal


def test_a_constant_that_wraps_is_not_taken_for_a_straight_line() -> None:
    wraps = torch.tensor([0, 2**62, -(2**63), -(2**62), 0, 2**62, -(2**63)])
    (found,) = hand_written(lambda n, m: (wraps[None] >= 0) | (q(n) < 0), static=7)
    assert not found.void


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_attention_over_other_than_four_dimensions_is_kept(rank: int) -> None:
    hole = causal(20, 20) & ~((q(20) == 18) & (k(20) == 3))
    x = torch.zeros(*(2, 3, 2)[: rank - 2], 20, 16)
    program = tiny.program_of(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=hole), x)
    for found in proofs(program):
        assert (found.mask.name, found.status) == ("arbitrary", "not_proved")


def test_a_table_that_is_given_is_no_segment() -> None:
    table = torch.zeros(7, 7, dtype=torch.int64)
    found = with_inputs(lambda x: causal(7, 7) & (x == x.gather(0, torch.arange(7)[None])), table)
    assert (found.mask.name, found.status) == ("arbitrary", "not_proved")


@pytest.mark.parametrize("given", [torch.tensor(3), torch.tensor([3])])
def test_an_input_without_dimensions_is_never_a_crash(given: Tensor) -> None:
    for made in (lambda p: p.cumsum(0) > 0, lambda p: (p > 0).any(0), lambda p: p.clamp(0, 5) > 0):
        assert with_inputs(lambda p, made=made: causal(7, 7) & made(p), given).mask != "causal"


def test_the_width_of_a_window_is_that_of_its_widest_row() -> None:
    for name, width in (("diagonal", 1), ("window", 3), ("window one short of the range", LONGEST - 1)):
        assert f"last {width} keys" in of_squares()[name].reason


def test_fewer_queries_than_keys_are_causal_at_one_end_only() -> None:
    found = hand_written(lower_right, causal, offset=3)
    assert [each.mask.name for each in found] == ["causal_lower_right", "causal"]
    assert not torch.equal(lower_right(4, 7), causal(4, 7))


def test_one_query_sees_every_key_so_its_lower_right_mask_is_void() -> None:
    (found,) = hand_written(lower_right, offset=6, static=7)
    assert found.mask.name == "full" and found.void and not found.causal


@pytest.mark.parametrize("length", [1, 9, 10, LONGEST])
def test_a_static_length_decides_what_a_mask_is(length: int) -> None:
    mask, _ = SQUARE["one element more"]
    (found,) = hand_written(mask, static=length)
    allowed = mask(length, length)
    assert found.causal == (length > 1 and torch.equal(allowed, causal(length, length)))
    assert found.void == bool(allowed.all())


def test_the_least_number_of_a_type_is_named_where_it_blocks() -> None:
    assert "least number" in of_squares()["additive, the least number"].reason
    assert "least number" not in of_squares()["additive"].reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_that_overflows_to_infinity_in_a_narrow_type_is_read_as_it_is_stored(dtype: torch.dtype) -> None:
    def attention(x: Tensor) -> Tensor:
        wide = torch.where(causal(x.shape[2], x.shape[2]), 0.0, torch.finfo(torch.float32).min)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=wide.to(dtype)[None, None])

    x = torch.zeros(1, 2, 7, 16, dtype=dtype)
    (found,) = proofs(tiny.program_of(attention, x, dynamic=({2: tiny.length(1, LONGEST)},)))
    assert found.causal


def with_inputs(mask: Callable[..., Tensor], *inputs: Tensor, keys: int = 7) -> Proof:
    """The proof of ``mask(*inputs)`` over 7 queries and ``keys`` keys."""

    def attention(x: Tensor, y: Tensor, *given: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, y, y, attn_mask=mask(*given)[None, None])

    x, y = torch.zeros(1, 2, 7, 16), torch.zeros(1, 2, keys, 16)
    (found,) = proofs(tiny.program_of(attention, x, y, *inputs))
    return found


def test_a_place_that_comes_with_the_input_is_an_offset() -> None:
    found = with_inputs(lambda place: k(12) <= q(7) + place, torch.tensor(0), keys=12)
    assert (found.mask.name, found.status, found.causal) == ("causal_offset", "proved", False)
    for other in (lambda place: k(12) < q(7) + place, lambda place: k(12) <= q(7) - place):
        found = with_inputs(other, torch.tensor(0), keys=12)
        assert (found.mask.name, found.status) == ("arbitrary", "not_proved")


def test_segments_of_an_input_are_packed() -> None:
    segments = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    found = with_inputs(lambda ids: causal(7, 7) & (ids[None] == ids[:, None]), segments)
    assert (found.mask.name, found.status) == ("packed", "proved")
    swapped = with_inputs(lambda ids: causal(7, 7) & (ids[None] == ids[:, None] + 0 * q(7).flip(0)), segments)
    assert not swapped.causal
    loose = with_inputs(lambda ids: causal(7, 7) & (ids[None] <= ids[:, None]), segments)
    assert (loose.mask.name, loose.status) == ("arbitrary", "not_proved")


def test_an_empty_range_of_indices_proves_nothing() -> None:
    (found,) = hand_written(causal, static=0)
    assert (found.mask.name, found.status) == ("arbitrary", "not_proved")


def test_a_mask_beside_is_causal_is_not_taken_for_either() -> None:
    program = tiny.program_of(
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=causal(7, 7)),
        torch.zeros(1, 2, 7, 16),
    )
    (call,) = find_calls(program.graph_module)
    call.node.args = (*call.node.args, 0.0, True)
    (found,) = proofs(program)
    assert (found.mask.name, found.status) == ("arbitrary", "not_proved") and "both" in found.reason


def test_a_call_without_mask_says_itself_what_it_is() -> None:
    for is_causal, kind in ((True, "causal"), (False, "none")):
        program = tiny.program_of(
            lambda x, flag=is_causal: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=flag),
            torch.zeros(1, 2, 7, 16),
        )
        (found,) = proofs(program)
        assert (found.mask.name, found.causal, found.void) == (kind, is_causal, not is_causal)


def test_a_mask_given_as_an_input_is_arbitrary_and_named() -> None:
    x, mask = torch.zeros(1, 2, 7, 16), torch.ones(1, 1, 7, 7, dtype=torch.bool)
    program = tiny.program_of(
        lambda x, mask: torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask), x, mask
    )
    (found,) = proofs(program)
    assert (found.mask.name, found.status) == ("arbitrary", "not_proved")
    assert found.depends_on == (program.graph_signature.user_inputs[1],)


def test_an_input_that_reaches_the_mask_through_an_unmodelled_operation_is_named() -> None:
    def attention(x: Tensor, ids: Tensor) -> Tensor:
        mask = (k(7) <= q(7)) & (ids.cumsum(0) > 3)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask[None, None])

    program = tiny.program_of(attention, torch.zeros(1, 2, 7, 16), torch.arange(7))
    (found,) = proofs(program)
    assert not found.causal and found.depends_on == (program.graph_signature.user_inputs[1],)
