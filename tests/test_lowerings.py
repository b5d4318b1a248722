"""A call is written anew as PyTorch means it: broadcast and grouped heads, and rows that see no key."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_compile import layers, lowered, small
from torch import Tensor
from torch.fx import Graph
from torch.nn.functional import scaled_dot_product_attention

from passes import classify
from passes.errors import RunError
from passes.graph import ops
from passes.graph.blank_rows import every_row_sees_a_key
from passes.graph.rewrite import rewrite
from passes.graph.writing import SDPA
from passes.proof.calls import find_calls
from passes.tensorrt.versions import load_stack
from pipeline.engine import network
from pipeline.engine.build import build_engine

STRATEGIES = ("detect_causal", "mask_input", "lowering", "decompose")
LENGTH, KEYS, SIZE = 5, 3, 16


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def assert_as_pytorch(function: Callable[..., Tensor], inputs: list[Tensor], dynamic: Any = None) -> list[Graph]:
    """The graph after each strategy, each of which computes ``function``."""
    program, graphs = tiny.program_of(function, *inputs, dynamic=dynamic), []
    for strategy in STRATEGIES:
        rewritten = rewrite(copy.deepcopy(program), strategy).program
        got = rewritten.module()(*inputs)
        assert got.isfinite().all()
        torch.testing.assert_close(got, function(*inputs), rtol=1e-5, atol=1e-5)
        graphs.append(rewritten.graph)
    return graphs


# -- heads -------------------------------------------------------------------------------------------

# Shapes of query, key and value, whether heads are grouped, and the heads of query, key and value that the call gets.
HEADS = {
    "one query head for all": ([(1, 1, LENGTH, SIZE), (1, 2, KEYS, SIZE), (1, 2, KEYS, SIZE)], False, (2, 2, 2)),
    "one key head for all": ([(1, 4, LENGTH, SIZE), (1, 1, KEYS, SIZE), (1, 1, KEYS, 8)], False, (4, 1, 1)),
    "one value head for all": ([(1, 4, LENGTH, SIZE), (1, 4, KEYS, SIZE), (1, 1, KEYS, SIZE)], False, (4, 4, 4)),
    "one key head, many values": ([(1, 1, LENGTH, SIZE), (1, 1, KEYS, SIZE), (1, 4, KEYS, SIZE)], False, (4, 4, 4)),
    "groups of their own": ([(1, 4, LENGTH, SIZE), (1, 2, KEYS, SIZE), (1, 1, KEYS, SIZE)], True, (4, 2, 2)),
    "groups that do not divide": ([(1, 6, LENGTH, SIZE), (1, 2, KEYS, SIZE), (1, 3, KEYS, SIZE)], True, (6, 6, 6)),
    "one query for a batch": ([(1, 2, LENGTH, SIZE), (3, 2, KEYS, SIZE), (1, 2, KEYS, SIZE)], False, (2, 2, 2)),
    "no batch": ([(2, LENGTH, SIZE), (2, KEYS, SIZE), (1, KEYS, SIZE)], False, (2, 2, 2)),
    "no heads": ([(LENGTH, SIZE), (KEYS, SIZE), (KEYS, SIZE)], False, (1, 1, 1)),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_batches_are_broadcast_and_repeated_as_pytorch_does(name: str) -> None:
    shapes, grouped, heads = HEADS[name]
    for graph in assert_as_pytorch(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) * 1.0,
        tensors(*shapes),
    ):
        (call,) = (node for node in graph.nodes if node.target in (SDPA, ops.NATIVE, ops.DECOMPOSED))
        given = [tensor.meta["val"].shape for tensor in call.args[:3]]
        assert [len(shape) for shape in given] == [4, 4, 4] and len({shape[0] for shape in given}) == 1
        assert tuple(shape[1] for shape in given) == heads


def test_heads_are_broadcast_at_a_length_that_is_dynamic() -> None:
    length = tiny.length()
    assert_as_pytorch(
        lambda q, k: scaled_dot_product_attention(q, k, k[:, :1], is_causal=True),
        tensors((1, 4, 7, SIZE), (1, 4, 7, SIZE)),
        ({2: length}, {2: length}),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_than_four_dimensions_are_refused_before_anything_is_built(strategy: str) -> None:
    program = tiny.program_of(lambda x: scaled_dot_product_attention(x, x, x), torch.randn(2, 2, 2, LENGTH, SIZE))
    with pytest.raises(RunError, match="5-D tensors; the layers take four") as error:
        rewrite(program, strategy)
    assert error.value.kind == "unsupported_op"


def test_an_engine_is_built_from_heads_that_are_broadcast() -> None:
    given = small(lambda q, k, v: scaled_dot_product_attention(q[:, :1], k, v, is_causal=True))
    program = rewrite(given.program, "lowering").program
    made = network.interpret(load_stack(), lowered(given.__class__(program, given.inputs)), network.ours())
    assert [layer.form.heads for layer in made.native_layers] == [(2, 2)]
    assert build_engine(load_stack(), made, lambda *_: True).data is not None


# -- rows that see no key ----------------------------------------------------------------------------

BEFORE = torch.ones(LENGTH, KEYS, dtype=torch.bool).tril(-2)  # rows 0 and 1 see nothing
BLANK = {
    "bool": BEFORE,
    "bool, of four dimensions": BEFORE[None, None],
    "-inf": torch.zeros(LENGTH, KEYS).masked_fill(~BEFORE, -torch.inf),
    "the lowest value": torch.zeros(LENGTH, KEYS).masked_fill(~BEFORE, torch.finfo(torch.float32).min),
    "a bias and -inf": torch.randn(LENGTH, KEYS).masked_fill(~BEFORE, -torch.inf),
    "no row sees any": torch.zeros(LENGTH, KEYS, dtype=torch.bool),
    "one column for all": BEFORE[:, :1],
}


@pytest.mark.parametrize("name", BLANK)
def test_a_row_that_sees_no_key_is_what_pytorch_makes_of_it(name: str) -> None:
    mask = BLANK[name]
    q, k, v = inputs = tensors((2, 4, LENGTH, SIZE), (2, 4, KEYS, SIZE), (2, 4, KEYS, SIZE))
    graphs = assert_as_pytorch(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask), inputs)
    right = scaled_dot_product_attention(q, k, v, mask)[:, :, :2]
    mean = v.mean(2, keepdim=True).expand_as(right)
    torch.testing.assert_close(right, mean if name == "the lowest value" else torch.zeros_like(right))
    natives = [node for graph in graphs for node in graph.nodes if node.target is ops.NATIVE]
    assert len(natives) == 3 and all([user.target for user in node.users] == [ops.BLANKED] for node in natives)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in BLANK if name != "the lowest value"])
def test_our_ops_are_pytorchs_in_every_type(name: str, dtype: torch.dtype) -> None:
    mask = BLANK[name]
    mask = mask if mask.dtype == torch.bool else mask.to(dtype)
    q, k, v = (x.to(dtype) for x in tensors((1, 4, LENGTH, SIZE), (1, 2, KEYS, SIZE), (1, 2, KEYS, SIZE)))
    right = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask if mask.dtype == torch.bool else mask.double(), enable_gqa=True
    )
    rounding = 8 * torch.finfo(dtype).eps
    for made in (ops.decomposed(q, k, v, mask, False, SIZE**-0.5), ops.native(q, k, v, mask, "none", SIZE**-0.5)):
        torch.testing.assert_close(made.double(), right, rtol=rounding, atol=rounding)


MASKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor | None], bool]] = {
    "none": (lambda q, k: None, True),
    "causal": (lambda q, k: k <= q, True),
    "full": (lambda q, k: (k >= 0) & (q >= 0), True),
    "sliding_window": (lambda q, k: (k <= q) & (k > q - 3), True),
    "chunked": (lambda q, k: (k <= q) & (k // 4 == q // 4), True),
    "arbitrary": (lambda q, k: k < q, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_row_is_blanked_unless_the_class_of_its_mask_shows_it_a_key(name: str) -> None:
    make, sees = MASKS[name]

    def attention(x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2])
        return scaled_dot_product_attention(x, x, x, make(at[:, None], at[None]))

    program = tiny.program_of(attention, *tensors((1, 2, 7, SIZE)), dynamic=({2: tiny.length()},))
    ((call, proof),) = classify(program)
    assert (proof.mask.name, every_row_sees_a_key(call, proof)) == (name, sees)
    (record,) = rewrite(program, "mask_input").calls
    blanked = [node for node in program.graph.nodes if node.target is ops.BLANKED]
    assert len(blanked) == (not sees) and record.mask == name


def test_a_window_over_fewer_keys_than_queries_may_show_a_row_none() -> None:
    def attention(q: Tensor, k: Tensor) -> Tensor:
        rows, at = torch.arange(LENGTH)[:, None] + KEYS - LENGTH, torch.arange(KEYS)[None]
        return scaled_dot_product_attention(q, k, k, at <= rows)

    inputs = tensors((1, 2, LENGTH, SIZE), (1, 2, KEYS, SIZE))
    ((call, proof),) = classify(tiny.program_of(attention, *inputs))
    assert proof.mask.name == "causal_lower_right" and not every_row_sees_a_key(call, proof)
    assert_as_pytorch(attention, inputs)


def test_what_is_left_to_upstream_says_that_such_rows_are_its_own() -> None:
    def attention(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1))

    program = tiny.program_of(attention, *tensors((1, 2, LENGTH, SIZE)))
    (record,) = rewrite(program, "upstream").calls
    assert record.reason.endswith("a row that sees no key need not be 0 as in PyTorch")
    assert find_calls(program.graph_module)


@pytest.mark.parametrize("strategy", ["detect_causal", "decompose"])
def test_an_engine_is_built_that_blanks_its_rows(strategy: str) -> None:
    given = small(lambda q, k, v: scaled_dot_product_attention(q, k, v, _before(q)))
    program = rewrite(given.program, strategy).program
    made = network.interpret(load_stack(), lowered(given.__class__(program, given.inputs)), network.ours())
    assert len(layers(made, "REDUCE")) == 1  # over the keys of the mask
    assert build_engine(load_stack(), made, lambda *_: True).data is not None


def _before(q: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    return at < at[:, None]
