"""Counterexamples are real: each is checked on the exported program itself, apart from the code that found it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import z3
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Interpreter

from passes.proof.calls import find_calls
from passes.proof.claims import Claims
from passes.proof.counterexample import Counterexample, find
from passes.proof.masks import constants_of
from passes.proof.sizes import symbol_ranges
from passes.proof.symbolic import Evaluator

LONGEST = 12
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def search(program: ExportedProgram, index: int = 0, attends: Any = None) -> Counterexample | None:
    """What is found for one call; ``attends`` replaces the evaluator's term for the mask."""
    call = find_calls(program.graph_module)[index]
    evaluator = Evaluator(symbol_ranges(program), constants_of(program))
    claims = Claims(evaluator, call)
    return find(
        call,
        evaluator,
        claims.attends if attends is None else attends,
        (claims.b, claims.h, claims.q, claims.k),
        claims.inside,
        frozenset(program.graph_signature.user_inputs),
    )


class Masks(Interpreter):
    """Runs a program as it was exported and keeps the masks that its attention calls are given."""

    def run_for_masks(self, *inputs: Tensor) -> list[Tensor]:
        self.masks: list[Tensor] = []
        self.run(*inputs, enable_io_processing=False)
        return self.masks

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is SDPA:
            query, key = args[:2]
            mask = args[3] if len(args) > 3 else kwargs["attn_mask"]
            self.masks.append(mask.expand(*query.shape[:3], key.shape[2]))
        return super().call_function(target, args, kwargs)


def at_sizes(size: int | torch.SymInt, sizes: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.expr.subs({symbol: sizes[symbol.name] for symbol in size.node.expr.free_symbols}))


def element(program: ExportedProgram, found: Counterexample, index: int = 0) -> Any:
    """The mask at the counterexample's place when the whole program runs on its sizes and inputs."""
    inputs = []
    for node in program.graph.nodes:
        if node.name in program.graph_signature.user_inputs:
            value = node.meta["val"]
            shape = [at_sizes(size, found.sizes) for size in value.shape]
            given = found.inputs.get(node.name)
            inputs.append(torch.zeros(shape, dtype=value.dtype) if given is None else torch.tensor(given).to(value))
            assert list(inputs[-1].shape) == shape
    mask = Masks(program.module()).run_for_masks(*inputs)[index]
    assert mask.shape[2:] == (found.queries, found.keys)
    return mask[found.batch, found.head, found.query, found.key].item()


def confirmed(program: ExportedProgram, index: int = 0, attends: Any = None) -> Counterexample:
    """The counterexample to call ``index``, which the program confirms."""
    found = search(program, index, attends)
    assert found is not None
    value = element(program, found, index)
    if isinstance(value, bool):
        assert (found.attends, found.bias) == (value, None) and value != (found.key <= found.query)
    elif found.bias is None:
        assert found.attends == (value == 0) and found.attends != (found.key <= found.query)
    else:
        assert found.attends and value == found.bias != 0
    return found


# -- Hugging Face's own masks ------------------------------------------------------------------------

IDS, PADDED, PLACED = ("input_ids",), ("input_ids", "attention_mask"), ("input_ids", "position_ids")
BOTH = ("input_ids", "attention_mask", "position_ids")


@pytest.mark.parametrize(
    ("name", "how", "text"),
    [
        ("llama", {"inputs": PLACED}, "key 0 would be visible to query 1 when position_ids = [[0, 0]]"),
        ("llama", {"inputs": PADDED, "batch": 2}, "key 0 would be visible to query 0 when attention_mask = [[0], [1]]"),
        ("llama", {"inputs": BOTH}, "key 0 would be visible to query 0 when attention_mask = [[0]]"),
        (
            "llama",
            {"inputs": PLACED, "lengths": (5, 5)},
            "key 0 would be visible to query 1 when position_ids = [[0, 0, 1, 2, 3]]",
        ),
        (
            "mistral",
            {"sliding_window": 1024, "lengths": (1, 2048)},
            "key 0 would be visible to query 1024 at length 1025",
        ),
    ],
)
def test_the_smallest_inputs_that_show_what_dropping_would_change(name: str, how: dict[str, Any], text: str) -> None:
    assert confirmed(tiny.traced(name, **how).program).text == f"dropped, {text}"


def test_a_counterexample_is_no_shorter_than_the_program_takes() -> None:
    found = confirmed(tiny.traced("llama", inputs=PADDED, lengths=(5, 64)).program)
    assert found.text == "dropped, key 0 would be visible to query 0 when attention_mask = [[0, 1, 1, 1, 1]]"


@pytest.mark.parametrize("how", [{}, {"sliding_window": 64}], ids=["no window", "a window as wide"])
def test_a_causal_mask_has_no_counterexample(how: dict[str, Any]) -> None:
    assert search(tiny.traced("mistral", **how).program) is None


# -- masks written by hand ---------------------------------------------------------------------------


def q(length: int) -> Tensor:
    return torch.arange(length)[:, None]


def k(keys: int) -> Tensor:
    return torch.arange(keys)[None]


def sdpa(x: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
    keys = x if keys is None else keys
    return torch.nn.functional.scaled_dot_product_attention(x, keys, keys, attn_mask=mask)


X = torch.zeros(1, 2, 7, 16)
# Name -> mask, the smallest length that shows it, query, key, attends.
SQUARE: dict[str, tuple[Callable[[int], Tensor], tuple[int, int, int, bool]]] = {
    "k < q": (lambda n: k(n) < q(n), (1, 0, 0, False)),
    "k <= q + 1": (lambda n: k(n) <= q(n) + 1, (2, 0, 1, True)),
    "transposed": (lambda n: q(n) <= k(n), (2, 0, 1, True)),
    "one row changed": (lambda n: (k(n) <= q(n)) & (q(n) != 3), (4, 3, 0, False)),
    "window one short": (lambda n: (k(n) <= q(n)) & (q(n) - k(n) < LONGEST - 1), (LONGEST, LONGEST - 1, 0, False)),
    "one element more": (lambda n: (k(n) <= q(n)) | ((q(n) == 7) & (k(n) == 9)), (10, 7, 9, True)),
    "chunked": (lambda n: (k(n) <= q(n)) & (k(n) // 4 == q(n) // 4), (5, 4, 0, False)),
    "full": (lambda n: torch.ones(n, n, dtype=torch.bool), (2, 0, 1, True)),
}


def test_a_hand_written_mask_is_refuted_where_it_first_differs() -> None:
    def attention(x: Tensor) -> list[Tensor]:
        return [sdpa(x, mask(x.shape[2])[None, None]) for mask, _ in SQUARE.values()]

    program = tiny.program_of(attention, X, dynamic=({2: tiny.length(1, LONGEST)},))
    for index, (name, (mask, expected)) in enumerate(SQUARE.items()):
        found = confirmed(program, index)
        assert (found.keys, found.query, found.key, found.attends) == expected, name
        assert list(found.sizes.values()) == [found.keys]
        for length in range(1, found.keys):
            assert torch.equal(mask(length), k(length) <= q(length)), name


def test_every_dynamic_size_is_reported_and_all_are_small() -> None:
    def attention(x: Tensor, past: Tensor, ids: Tensor) -> Tensor:
        n = x.shape[2]
        mask = (k(n) <= q(n)) & ids.bool()[:, None, None, :]
        return sdpa(x, torch.cat([torch.ones_like(past[:, :1, :, :1]).bool().mT.expand(-1, -1, n, -1), mask], -1),
                    torch.cat([past, x], 2))  # fmt: skip

    batch, length, before = Dim("batch", min=1, max=8), tiny.length(), Dim("past", min=1, max=20)
    program = tiny.program_of(
        attention,
        torch.zeros(3, 2, 7, 16),
        torch.zeros(3, 2, 5, 16),
        torch.ones(3, 7, dtype=torch.int64),
        dynamic=({0: batch, 2: length}, {0: batch, 2: before}, {0: batch, 1: length}),
    )
    found = confirmed(program)
    assert sorted(found.sizes.values()) == [1, 1, 1] and (found.queries, found.keys) == (1, 2)
    assert found.text.startswith("dropped, key 1 would be hidden from query 0 at 1 queries and 2 keys when ")


def test_a_head_and_a_sequence_that_differ_alone_are_named() -> None:
    def attention(x: Tensor) -> Tensor:
        n = x.shape[2]
        off = (torch.arange(3)[:, None, None, None] == 2) & (torch.arange(2)[None, :, None, None] == 1)
        return sdpa(x, (k(n) <= q(n)) & ~off)

    program = tiny.program_of(attention, X.expand(3, -1, -1, -1), dynamic=({2: tiny.length()},))
    found = confirmed(program)
    assert (found.batch, found.head) == (2, 1)
    assert "visible to query 0 of sequence 2 in head 1 at length 1" in found.text


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (lambda n: torch.where(k(n) <= q(n) - 0, 0.0, -torch.inf), None),
        (lambda n: torch.where(k(n) < q(n), 0.0, -torch.inf), "key 0 would be visible to query 0 at length 1"),
        (
            lambda n: torch.where(k(n) <= q(n) + 1, 0.0, torch.finfo(torch.float32).min),
            "key 1 would be hidden from query 0 at length 2",
        ),
        (lambda n: torch.where(k(n) <= q(n), 0.0, -1e4), "key 1 would be hidden from query 0 at length 2"),
        (
            lambda n: torch.where(k(n) <= q(n), (k(n) - q(n)) * 0.5, -torch.inf),
            "the bias -0.5 of key 0 at query 1 would be lost at length 2",
        ),
    ],
    ids=["causal", "k < q", "finfo.min", "a bias for a mask", "alibi"],
)
def test_a_float_mask_is_read_by_what_it_adds_to_the_scores(mask: Callable[[int], Tensor], text: str | None) -> None:
    program = tiny.program_of(lambda x: sdpa(x, mask(x.shape[2])[None, None]), X, dynamic=({2: tiny.length()},))
    unknown = z3.Bool("attends")  # no model for floats
    found = search(program, attends=unknown)
    assert (found and found.text) == (text and f"dropped, {text}")
    assert found is None or element(program, found) != (0.0 if found.key <= found.query else -torch.inf)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_that_is_an_input_can_be_anything(dtype: torch.dtype) -> None:
    length = tiny.length()
    program = tiny.program_of(
        lambda x, mask: sdpa(x, mask),
        X,
        torch.zeros(1, 1, 7, 7, dtype=dtype),
        dynamic=({2: length}, {2: length, 3: length}),
    )
    found = confirmed(program, attends=None if dtype == torch.bool else z3.Bool("attends"))
    assert (found.keys, found.query, found.key) == (1, 0, 0) and not found.attends
    assert list(found.inputs) == [program.graph_signature.user_inputs[1]]


def test_an_offset_that_is_an_input_is_refuted_by_the_smallest_other_than_zero() -> None:
    def attention(x: Tensor, offset: Tensor) -> Tensor:
        return sdpa(x, (k(x.shape[2]) <= q(x.shape[2]) + offset)[None, None])

    program = tiny.program_of(attention, X, torch.tensor(0), dynamic=({2: tiny.length()}, None))
    name = program.graph_signature.user_inputs[1]
    assert confirmed(program).text == f"dropped, key 1 would be hidden from query 0 at length 2 when {name} = 1"


def test_a_value_that_no_readable_input_has_comes_from_the_solver() -> None:
    def attention(x: Tensor, ids: Tensor) -> Tensor:
        return sdpa(x, (k(x.shape[2]) <= q(x.shape[2])) & (ids != 77)[:, None, None])

    length = tiny.length()
    program = tiny.program_of(attention, X, torch.zeros(1, 7, dtype=torch.int64), dynamic=({2: length}, {1: length}))
    found = confirmed(program)
    assert list(found.inputs.values()) == [[[77]]]


# -- where the solver is led astray ------------------------------------------------------------------


def test_an_operation_without_a_model_does_not_make_a_false_counterexample() -> None:
    """The solver takes a remainder by a tensor for anything; the graph makes it 0, so the mask is causal."""

    def attention(x: Tensor, ids: Tensor) -> Tensor:
        nothing = torch.remainder(ids * 0, ids.abs() + 1)
        return sdpa(x, (k(x.shape[2]) <= q(x.shape[2]) + nothing[:, None, :, None]))

    length = tiny.length()
    program = tiny.program_of(attention, X, torch.ones(1, 7, dtype=torch.int64), dynamic=({2: length}, {1: length}))
    assert search(program) is None


def test_behind_an_operation_without_a_model_a_larger_size_is_tried() -> None:
    """The median of the positions passes 3 from length 8 on."""

    def attention(x: Tensor, ids: Tensor) -> Tensor:
        n = x.shape[2]
        return sdpa(x, (k(n) <= q(n)) & (torch.arange(n).float().median() < 3))

    length = tiny.length()
    program = tiny.program_of(attention, X, torch.ones(1, 7, dtype=torch.int64), dynamic=({2: length}, {1: length}))
    found = confirmed(program)
    assert found.keys == 8 and not found.inputs


def test_behind_an_operation_without_a_model_a_negative_value_is_tried() -> None:
    def attention(x: Tensor, ids: Tensor) -> Tensor:
        sums = ids.cumsum(-1)
        return sdpa(x, (k(x.shape[2]) <= q(x.shape[2])) & (sums[:, None, :, None] >= sums[:, None, None, :]))

    length = tiny.length()
    program = tiny.program_of(attention, X, torch.zeros(1, 7, dtype=torch.int64), dynamic=({2: length}, {1: length}))
    found = confirmed(program)
    assert (found.query, found.key) == (1, 0) and list(found.inputs.values()) == [[[0, -1]]]


def test_inputs_that_the_graph_refuses_are_no_counterexample() -> None:
    """A table of 4 rows is read at the input's values; the solver is free to choose others, the graph is not."""
    table = torch.tensor([True, True, False, True])

    def attention(x: Tensor, ids: Tensor) -> Tensor:
        return sdpa(x, (k(x.shape[2]) <= q(x.shape[2])) & table[ids][:, None, None])

    length = tiny.length()
    program = tiny.program_of(attention, X, torch.zeros(1, 7, dtype=torch.int64), dynamic=({2: length}, {1: length}))
    found = confirmed(program)
    (ids,) = found.inputs.values()
    assert 2 in ids[0] and all(-4 <= value < 4 for value in ids[0])


def test_weights_that_reach_a_mask_leave_it_without_counterexample() -> None:
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(7, 7))

        def forward(self, x: Tensor) -> Tensor:
            return sdpa(x, (k(7) <= q(7)) & (self.bias > 0))

    program = torch.export.export(Learned(), (X,)).run_decompositions({})
    assert search(program) is None


def test_a_search_ends_in_time_on_a_huge_profile() -> None:
    """Every length up to 2**40 is in the profile, and none that can be run shows a difference."""

    def attention(x: Tensor) -> Tensor:
        n = x.shape[2]
        return sdpa(x, (k(n) <= q(n)) & (q(n) - k(n) < 2**36))

    program = tiny.program_of(attention, X, dynamic=({2: tiny.length(1, 2**40)},))
    started = time.perf_counter()
    assert search(program) is None
    assert time.perf_counter() - started < 5


# -- text --------------------------------------------------------------------------------------------


def test_long_inputs_are_short_in_the_text_and_whole_in_the_data() -> None:
    found = confirmed(tiny.traced("llama", inputs=PADDED, lengths=(100, 100)).program)
    assert found.text.endswith("when attention_mask = [[0, 1, 1, 1, ..., 1, 1]]")
    assert found.inputs["attention_mask"] == [[0] + [1] * 99]
    assert found.describe()["text"] == found.text and found.describe()["sizes"] == {}


def test_inputs_of_more_than_4096_elements_are_left_out() -> None:
    found = search(tiny.traced("llama", inputs=PADDED, batch=70, lengths=(64, 64)).program)
    assert found is not None and found.inputs == {}
    assert found.text == "dropped, key 0 would be visible to query 0 at length 64"
