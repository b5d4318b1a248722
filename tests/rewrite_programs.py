"""Random small programs of the kind that the passes rewrite: products, norms, attention, views, with weights that
several of them share, values that are read more than once, and results that are written in place.

A program is a list of steps, each of which makes a new value [1, length, SIZE] of two earlier ones and of a weight out
of a small pool.  Whatever a pass may trip over is a step of its own, also what no model does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, HEADS, KEY_HEADS = 8, 4, 2
HEAD = SIZE // HEADS
POOL = 3
SCALE = 0.25
"""Of attention, and not what its head size would give."""


class Step(NamedTuple):
    """``kind`` of :data:`STEPS`; ``one``, ``other``: which earlier values it reads; ``weight``: which of the pool."""

    kind: str
    one: int
    other: int
    weight: int


class Program(nn.Module):
    """``steps``; ``kept``: the values that are outputs too; ``choice``: how the rows are chosen that are read last."""

    def __init__(self, steps: Sequence[Step], kept: Sequence[int], choice: str) -> None:
        super().__init__()
        self.steps, self.kept, self.choice = steps, kept, choice
        generator = torch.Generator().manual_seed(len(steps))

        def pool(*shape: int) -> nn.ParameterList:
            drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for _ in range(POOL)]
            return nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in drawn)

        self.square, self.few, self.gain = pool(SIZE, SIZE), pool(KEY_HEADS * HEAD, SIZE), pool(SIZE)
        self.head_gain, self.fused, self.place = pool(HEAD), pool(SIZE + KEY_HEADS * HEAD, SIZE), pool(SIZE, SIZE)
        self.tied = nn.Linear(SIZE, SIZE, bias=False)
        self.tied.weight = self.square[0]

    def forward(self, x: Tensor, rows: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        """``x`` [1, length, SIZE]; ``rows`` [2], of places that are chosen; ``keep`` [1, length], 0 at padding."""
        made = [x]
        for step in self.steps:
            one, other = (made[-1 - place % len(made)] for place in (step.one, step.other))
            made.append(STEPS[step.kind](self, one, other, step.weight, keep))
        last = F.linear(CHOICES[self.choice](made[-1], rows), self.square[0])
        return (last, *(made[place % len(made)] for place in self.kept))


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(1, -1, count, HEAD).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(1, x.shape[2], -1)


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * 0.8 + torch.cat([-x[..., half:], x[..., :half]], -1) * 0.6


def repeated(x: Tensor) -> Tensor:
    return x[:, :, None].expand(1, KEY_HEADS, HEADS // KEY_HEADS, *x.shape[2:]).reshape(1, HEADS, *x.shape[2:])


def tiled(x: Tensor) -> Tensor:
    return x[:, None].expand(1, HEADS // KEY_HEADS, KEY_HEADS, *x.shape[2:]).reshape(1, HEADS, *x.shape[2:])


def attention(
    mask: Callable[[Tensor, Tensor, Tensor], Tensor | None],
    spread: Callable[[Tensor], Tensor] = repeated,
    turn: Callable[[Tensor], Tensor] = lambda x: x,
    **how: Any,
) -> Callable[..., Tensor]:
    """Grouped-query attention of one value over another, with a mask made of rows, columns and padding."""

    def step(p: Program, x: Tensor, y: Tensor, i: int, keep: Tensor) -> Tensor:
        q = turn(heads(F.linear(x, p.square[i], p.gain[i]), HEADS))
        k, v = (heads(F.linear(y, p.few[j % POOL]), KEY_HEADS) for j in (i, i + 1))
        at = torch.arange(x.shape[1])
        seen = mask(at[:, None], at[None], keep)
        return joined(F.scaled_dot_product_attention(q, spread(turn(k)), spread(v), seen, scale=SCALE, **how))

    return step


def shared_projection(p: Program, x: Tensor, y: Tensor, i: int, keep: Tensor) -> Tensor:
    """Query, key and value by one weight."""
    q, k = (heads(F.linear(each, p.square[i]), HEADS) for each in (x, y))
    return joined(F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=SCALE))


def normed_heads(p: Program, x: Tensor, y: Tensor, i: int, keep: Tensor) -> Tensor:
    """As Qwen3's: a norm over each head."""
    q = rotated(rms(heads(p.tied(x), HEADS)) * p.head_gain[i])
    k = rotated(rms(heads(F.linear(y, p.few[i]), KEY_HEADS)) * p.head_gain[(i + 1) % POOL])
    v = heads(F.linear(y, p.few[(i + 1) % POOL]), KEY_HEADS)
    return joined(F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True, scale=SCALE))


def one_head_for_all(p: Program, x: Tensor, y: Tensor, i: int, keep: Tensor) -> Tensor:
    q, k = heads(F.linear(x, p.square[i]), HEADS), heads(F.linear(y, p.few[i]), KEY_HEADS)
    return joined(F.scaled_dot_product_attention(q, k[:, :1], k[:, 1:], is_causal=True, scale=SCALE))


def query_and_key(then: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Heads of query and key out of one product, ``then`` what is done to them, and a value that hangs on both."""

    def step(p: Program, x: Tensor, y: Tensor, i: int, keep: Tensor) -> Tensor:
        product = F.linear(x, p.fused[i])
        q, k = product[..., :SIZE], product[..., SIZE : SIZE + KEY_HEADS * HEAD]
        q, k = q.reshape(1, -1, HEADS, HEAD), k.reshape(1, -1, KEY_HEADS, HEAD)
        q, k = then(q, k, p.head_gain[i], p.head_gain[(i + 1) % POOL], y[..., :HEAD].unsqueeze(2))
        return q.reshape(1, -1, SIZE) + torch.cat([k.reshape(1, -1, KEY_HEADS * HEAD)] * 2, -1)

    return step


def in_place(x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    made = x * 1
    change(made)
    return made


STEPS: dict[str, Callable[..., Tensor]] = {
    # products
    "product": lambda p, x, y, i, keep: F.linear(x, p.square[i]),
    "with a bias": lambda p, x, y, i, keep: F.linear(x, p.square[i], p.gain[i]),
    "two of one row": lambda p, x, y, i, keep: F.linear(x, p.square[i]) * F.linear(x, p.square[(i + 1) % POOL]).tanh(),
    "tied": lambda p, x, y, i, keep: p.tied(x),
    "tied, transposed": lambda p, x, y, i, keep: F.linear(x, p.square[0].t()),
    "of GPT-2's kind": lambda p, x, y, i, keep: torch.addmm(p.gain[i], x.view(-1, SIZE), p.square[i]).view(x.shape),
    "a bias for each row": lambda p, x, y, i, keep: F.linear(x.view(-1, SIZE), p.square[i], y.view(-1, SIZE))[None],
    "weight of itself": lambda p, x, y, i, keep: F.linear(x.view(-1, SIZE), x.view(-1, SIZE))[None].tanh() + x,
    "weight of another": lambda p, x, y, i, keep: F.linear(x, y[0]).tanh() + x,
    "its rows weighed": lambda p, x, y, i, keep: torch.matmul(p.place[i][: x.shape[1], : x.shape[1]], x),
    # element by element
    "sum": lambda p, x, y, i, keep: x + y,
    "difference, twice": lambda p, x, y, i, keep: torch.sub(x, y, alpha=2),
    "gate": lambda p, x, y, i, keep: F.silu(x) * y.tanh(),
    "square": lambda p, x, y, i, keep: x.tanh().pow(2),
    "gain": lambda p, x, y, i, keep: x * p.gain[i],
    "gain, then product": lambda p, x, y, i, keep: F.linear(rms(x) * p.gain[i], p.square[i]),
    "gain of each place": lambda p, x, y, i, keep: x * p.place[i][: x.shape[1]],
    "first of another": lambda p, x, y, i, keep: x + y[:, :1],
    "norm": lambda p, x, y, i, keep: rms(x) * p.gain[i],
    "layer norm": lambda p, x, y, i, keep: F.layer_norm(x, (SIZE,), p.gain[i]),
    "as the type of another": lambda p, x, y, i, keep: (x * 2).type_as(y),
    "to its own type": lambda p, x, y, i, keep: x.to(torch.float64).detach(),
    # views and pieces
    "heads and back": lambda p, x, y, i, keep: joined(heads(x, HEADS) * 2),
    "turned": lambda p, x, y, i, keep: (x.permute(2, 0, 1) + 1).permute(1, 2, 0),
    "flat": lambda p, x, y, i, keep: F.linear(x.reshape(-1, SIZE).tanh(), p.square[i]).view(1, -1, SIZE),
    "other pieces": lambda p, x, y, i, keep: torch.cat(list(x.chunk(2, -1))[::-1], -1),
    "two pieces": lambda p, x, y, i, keep: torch.cat([x.split(4, -1)[0] * y.split(4, -1)[1], x[..., 4:]], -1),
    "reshaped": lambda p, x, y, i, keep: x.reshape(1, SIZE, -1).transpose(1, 2),
    # what mixes rows, or gives more than one thing
    "over rows": lambda p, x, y, i, keep: x - x.mean(1, keepdim=True),
    "over all": lambda p, x, y, i, keep: x - x.mean(),
    "running": lambda p, x, y, i, keep: x.cumsum(1) / 4,
    "flipped": lambda p, x, y, i, keep: x.flip(1),
    "sorted": lambda p, x, y, i, keep: x.sort(-1).values,
    "rows sorted": lambda p, x, y, i, keep: x.sort(1)[0],
    "largest": lambda p, x, y, i, keep: torch.cat([x.topk(4, -1).values] * 2, -1),
    "below the largest": lambda p, x, y, i, keep: x - x.max(1, keepdim=True)[0],
    "standardised": lambda p, x, y, i, keep: x - torch.var_mean(x, 1, correction=0, keepdim=True)[1],
    # attention
    "causal": attention(lambda q, k, keep: None, is_causal=True),
    "causal by a mask": attention(lambda q, k, keep: k <= q, turn=rotated),
    "causal, added": attention(lambda q, k, keep: torch.where(k <= q, 0.0, -torch.inf).double()),
    "window": attention(lambda q, k, keep: (k <= q) & (k > q - 3)),
    "unmasked, in groups": attention(lambda q, k, keep: None, lambda x: x, enable_gqa=True),
    "tiled heads": attention(lambda q, k, keep: k <= q, tiled),
    "padding": attention(lambda q, k, keep: (k <= q) & (keep != 0)[:, None, None]),
    "keys before": attention(lambda q, k, keep: k < q),
    "shared projection": shared_projection,
    "normed heads": normed_heads,
    "one head for all": one_head_for_all,
    # query and key of one product
    "turned alike": query_and_key(lambda q, k, a, b, c: (rotated(q), rotated(k))),
    "normed alike": query_and_key(lambda q, k, a, b, c: (rms(q) * a, rms(k) * b)),
    "scaled by another": query_and_key(lambda q, k, a, b, c: (q * c, k * c)),
    "scaled by the first": query_and_key(lambda q, k, a, b, c: (q * q[:, :, :1], k * q[:, :, :1])),
    "key first": query_and_key(lambda q, k, a, b, c: (q * k.mean(2, keepdim=True) + q * 2, k * 2)),
    "one of them more": query_and_key(lambda q, k, a, b, c: (rotated(q).tanh(), rotated(k) * a)),
    # written in place
    "in place": lambda p, x, y, i, keep: in_place(x, lambda made: made.mul_(2).add_(y)),
    "a view in place": lambda p, x, y, i, keep: in_place(x, lambda made: made[..., : SIZE // 2].neg_()),
    "a row in place": lambda p, x, y, i, keep: in_place(x, lambda made: made[:, -1].fill_(0.5)),
}  # fmt: skip
CHOICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last": lambda x, rows: x[:, -1:],
    "named": lambda x, rows: x[:, rows],
    "all": lambda x, rows: x,
    "some": lambda x, rows: x[:, -2:],
}
IN_PLACE = [kind for kind in STEPS if "in place" in kind]  # exported another way, which takes long


@st.composite
def programs(draw: st.DrawFn, most: int = 7, attends: bool = True) -> Program:
    """Programs of up to ``most`` steps; ``attends``: one of them is attention, though nothing may read it."""
    small = st.sampled_from([0, 0, 0, 1, 2])
    kinds = st.sampled_from([kind for kind in STEPS if kind not in IN_PLACE])
    drawn = draw(st.lists(kinds, min_size=1, max_size=most))
    if attends and not set(drawn) & set(ATTENTION):
        drawn.insert(draw(st.integers(0, len(drawn))), draw(st.sampled_from(ATTENTION)))
    if draw(st.integers(0, 7)) == 7:
        drawn.insert(draw(st.integers(0, len(drawn))), draw(st.sampled_from(IN_PLACE)))
    if draw(st.booleans()):  # as in a model, whose last rows alone are read
        drawn += draw(st.lists(st.sampled_from(ROW_BY_ROW), min_size=1, max_size=3))
    steps = [Step(kind, draw(small), draw(st.integers(0, most)), draw(st.integers(0, POOL - 1))) for kind in drawn]
    kept = draw(st.lists(st.integers(0, most), max_size=2, unique=True))
    return Program(steps, kept, draw(st.sampled_from(["last", "named", *CHOICES])))


ROW_BY_ROW = [
    "product", "with a bias", "two of one row", "tied", "of GPT-2's kind", "sum", "gate", "gain, then product", "norm",
    "layer norm", "gain of each place", "as the type of another", "heads and back", "flat",
]  # fmt: skip
ATTENTION = [
    "causal", "causal by a mask", "causal, added", "window", "unmasked, in groups", "tiled heads", "padding",
    "keys before", "shared projection", "normed heads", "one head for all",
]  # fmt: skip


def inputs(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """For a :class:`Program`: values, places of which one counts from the end, and padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, length, SIZE, generator=generator, dtype=torch.float64)
    keep = (torch.arange(length) >= length // 3).long().unsqueeze(0)
    return values, torch.tensor([length // 2, -1]), keep
