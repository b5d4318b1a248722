"""What is done alike to query and key is done once, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_decode import lowered_step
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import query_key_joining
from passes.tensorrt import rows

aten = torch.ops.aten
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def products(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if node.target is rows.LINEAR]


def kinds(graph: GraphModule) -> Counter[Any]:
    return Counter(node.target for node in graph.graph.nodes)


@pytest.mark.parametrize(("name", "layers", "means"), [("llama", 2, 2), ("qwen2", 1, 2), ("qwen3", 1, 3)])
def test_query_and_key_are_normed_and_rotated_together(name: str, layers: int, means: int) -> None:
    """``means``: of a layer, its two norms and, once, that of query and key; and the last norm."""
    graph, inputs = lowered_step(name)
    gains = [value for key, value in graph.state_dict().items() if "norm" in key]
    for gain in gains:  # ones, in a new model
        gain.uniform_(0.5, 2)
    before = graph(**inputs)

    tiny.with_fused_rows(graph)

    found = kinds(graph)
    assert len(gains) > means * layers
    assert found[aten.neg.default] == layers  # each layer turns once
    assert found[aten.mean.dim] == means * layers + 1
    for one, other in zip(graph(**inputs), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * angle + torch.cat([-x[..., half:], x[..., :half]], -1)


def normed(x: Tensor, gain: Tensor, least: float = 1e-6) -> Tensor:
    return x / torch.sqrt(torch.mean(x * x, [-1], True) + least) * gain


class Attention(torch.nn.Module):
    """One product into the heads of query and key, and ``then`` what is done to them."""

    def __init__(self, then: Callable[..., tuple[Tensor, Tensor]], heads: int = HEADS, around: int = 1) -> None:
        super().__init__()
        self.then, self.heads, self.around = then, heads, around
        self.product = torch.nn.Linear(16, (heads + KEY_HEADS) * SIZE)
        self.gains = torch.nn.ParameterList(torch.randn(SIZE) for _ in range(2))

    def forward(self, row: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        product = self.product(row)
        query, key = (
            product[..., : self.heads * SIZE],
            product[..., self.heads * SIZE : (self.heads + KEY_HEADS) * SIZE],
        )
        query, key = (each.reshape(1, self.around, -1, SIZE) for each in (query, key))
        return self.then(query, key, angle, *self.gains)


def joined(
    then: Callable[..., tuple[Tensor, Tensor]], angle: tuple[int, ...], heads: int = HEADS, around: int = 1
) -> Counter[Any]:
    """The operations of the joined graph, which gives what the graph gave before, bit by bit."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 1, 16), torch.randn(angle)
    graph = torch.export.export(Attention(then, heads, around), inputs).run_decompositions({}).module()
    for node in list(graph.graph.nodes):  # as in a lowered graph
        if node.target is aten.reshape.default:
            node.target = aten._reshape_copy.default
    before = graph(*inputs)

    query_key_joining.join(graph, products(graph))
    graph.graph.lint()
    graph.recompile()

    for one, other in zip(graph(*inputs), before, strict=True):
        assert torch.equal(one, other)
    return kinds(graph)


def test_what_is_alike_is_joined_and_the_rest_reads_its_part() -> None:
    found = joined(
        lambda q, k, angle, a, b: (turned(normed(q, a), angle).transpose(1, 2), turned(normed(k, b), angle).exp()),
        (1, 1, 1, SIZE),
    )

    assert found[aten.mean.dim] == found[aten.neg.default] == found[aten.cat.default] == 1
    assert found[aten.exp.default] == 1  # of the key alone


@pytest.mark.parametrize("heads", [1, KEY_HEADS, HEADS])
def test_any_number_of_heads_is_joined(heads: int) -> None:
    found = joined(lambda q, k, angle, a, b: (turned(q, angle), turned(k, angle)), (SIZE,), heads)

    assert found[aten.neg.default] == 1


@pytest.mark.parametrize(
    ("then", "angle"),
    [
        (lambda q, k, angle, a, b: (normed(q, a), normed(k, b, 1e-5)), (1,)),  # joined up to the sum, not behind
        (lambda q, k, angle, a, b: (q * angle, k * angle[:, :, :KEY_HEADS]), (1, 1, HEADS, SIZE)),
        (lambda q, k, angle, a, b: (torch.softmax(q, 2), torch.softmax(k, 2)), (1,)),
        (lambda q, k, angle, a, b: (q - q.mean(2, True), k - k.mean(2, True)), (1,)),
        (lambda q, k, angle, a, b: (q[:, :, 1:] * 2, k[:, :, 1:] * 2), (1,)),
        (lambda q, k, angle, a, b: (torch.cat([q, q], 2) * 2, torch.cat([k, k], 2) * 2), (1,)),
        (lambda q, k, angle, a, b: (torch.cat([q, angle], 3), torch.cat([k, angle[:, :, :2]], 3)), (1, 1, HEADS, 2)),
        (lambda q, k, angle, a, b: (q * angle, k * angle), (3, 2, 1, 1, SIZE)),
        (lambda q, k, angle, a, b: (q * a, k + b), (1,)),
        (lambda q, k, angle, a, b: (q * q[:, :, :1], k * q[:, :, :1]), (1,)),
    ],
    ids=[
        "epsilon", "heads differ", "softmax over heads", "mean over heads", "some heads", "heads twice",
        "channels of one", "more axes", "other operations", "one head of the query",
    ],
)  # fmt: skip
def test_what_is_not_alike_keeps_its_value(then: Callable[..., tuple[Tensor, Tensor]], angle: tuple[int, ...]) -> None:
    joined(then, angle)


def test_query_and_key_that_are_used_together_stay_apart_there() -> None:
    found = joined(lambda q, k, angle, a, b: (q * angle, k * angle + q[:, :, :1] * angle), (1, 1, 1, SIZE), KEY_HEADS)

    assert found[aten.add.Tensor] == 1


def test_a_gain_becomes_part_of_the_weights_behind_it_alone() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gains = torch.nn.ParameterList(torch.randn(16) for _ in range(2))
            self.one, self.other = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            shared = (x + 1) * self.gains[1]
            return torch.cat([self.one(self.gains[0] * (x * 2)), self.other(shared), shared], -1)

    row = torch.randn(1, 1, 16)
    graph = torch.export.export(Layer(), (row,)).run_decompositions({}).module()
    before = graph(row)

    tiny.with_fused_rows(graph)

    assert kinds(graph)[aten.mul.Tensor] == 2  # by 2, and the gain of the row that is read twice
    torch.testing.assert_close(graph(row), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("early", [True, False])
def test_what_is_put_together_is_made_before_all_that_reads_it(early: bool) -> None:
    """One product of a row is far from the other, and what reads the first of them may stand between."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            row = x * 2
            first = self.one(row).tanh()
            return first + self.other(row) * 2 if early else self.other(row) * 2 + first

    row = torch.randn(1, 1, 16)
    graph = torch.export.export(Layer(), (row,)).run_decompositions({}).module()
    before = graph(row)
    (read,) = (node for node in graph.graph.nodes if node.target is aten.mul.Tensor and len(node.users) == 2)
    users = list(read.users)
    for user in users if early else users[::-1]:  # the order in which a pass before has left them
        del read.users[user]
        read.users[user] = None

    tiny.with_fused_rows(graph)

    assert len(products(graph)) == 1
    torch.testing.assert_close(graph(row), before, rtol=1e-5, atol=1e-6)


def test_channels_that_are_split_into_more_than_heads_stay_apart() -> None:
    found = joined(
        lambda q, k, angle, a, b: (turned(q, angle), turned(k, angle)),
        (SIZE,),
        around=2,
    )
    assert found[aten.neg.default] == 2


def test_a_square_is_a_product_and_a_whole_number_to_the_power_of_two_point_zero_stays_a_fraction() -> None:
    class Square(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.pow(2.0)

    power = torch.ops.aten.pow.Tensor_Scalar
    for number, wanted, powers in ((torch.tensor([3.0]), 9.0, 0), (torch.tensor([3]), 9.0, 1)):
        graph = torch.export.export(Square(), (number,)).run_decompositions({}).module()
        tiny.with_fused_rows(graph)
        assert sum(node.target is power for node in graph.graph.nodes) == powers
        assert torch.equal(graph(number), torch.tensor([wanted]))
