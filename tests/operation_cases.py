"""Random applications of each operation that has a model: arguments of every type, at and beside the types' bounds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

aten = torch.ops.aten

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TYPES = (torch.bool, *INTEGERS, *FLOATS)

POWERS = (2**7, 2**8, 2**11, 2**15, 2**16, 2**24, 2**31, 2**32, 2**53, 2**63)
BOUNDS = tuple(sorted({sign * power + near for power in POWERS for near in (-1, 0, 1) for sign in (-1, 1)}))
SMALL = tuple(range(-3, 6))
FRACTIONS = (
    0.5,
    -0.5,
    0.1,
    1.5,
    -2.7,
    1e-8,
    1e38,
    65504.0,
    65519.9,
    65520.0,
    float("inf"),
    -float("inf"),
    float("nan"),
)


class Size(int):
    """A number that the graph computes, as a size is: the model is given a node."""


class Made(NamedTuple):
    """An argument that another operation makes."""

    target: Any
    args: tuple[Any, ...]


class Case(NamedTuple):
    """The arguments of one application."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012 (of a named tuple)
    hidden: tuple[bool, ...] = (False,)
    """Which inputs the models know only as unknowns, in turn."""
    by_letter: bool = False
    """Whether the models are asked about a place that is a letter, or about each place."""


def fitting(dtype: torch.dtype) -> tuple[Any, ...]:
    """Numbers that tell on ``dtype``, all within it."""
    if dtype == torch.bool:
        return (False, True)
    if dtype in INTEGERS:
        limits = torch.iinfo(dtype)
        return tuple(number for number in (*SMALL, *BOUNDS) if limits.min <= number <= limits.max)
    limits = torch.finfo(dtype)
    return (*SMALL, *BOUNDS, *FRACTIONS, -0.0, limits.min, limits.max, limits.tiny, limits.smallest_normal)


class Draws:
    """Random choices, in the words of tensors."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def shape(self, least: int = 0, most: int = 3) -> list[int]:
        return [self.pick(*(1, 2, 3) * 4, 0) for _ in range(self.whole(least, most))]

    def under(self, shape: Sequence[int]) -> list[int]:
        """A shape that broadcasts to ``shape``."""
        kept = shape[self.whole(0, len(shape)) :] if self.pick(False, True) else shape
        return [self.pick(size, size, 1) for size in kept]

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], among: Sequence[Any] | None = None) -> Tensor:
        count = torch.Size(shape).numel()
        how = "any" if among else self.pick("small", "any", "any", "one", "rising")
        if how == "rising" and dtype in INTEGERS:
            return (torch.arange(count) + self.whole(0, 2)).to(dtype).reshape(shape)
        numbers = among or fitting(dtype)
        if how == "small":
            numbers = tuple(number for number in numbers if abs(number) <= 3)
        values = [self.pick(*numbers)] * count if how == "one" else [self.pick(*numbers) for _ in range(count)]
        return of_numbers(values, dtype).reshape(shape)

    def type(self, first: torch.dtype) -> torch.dtype:
        """A type to go with ``first``: often the same."""
        return self.pick(*[first] * (20 if first == torch.bool else 6), *TYPES)

    def scalar(self) -> Any:
        number = self.pick(*SMALL, *SMALL, *SMALL, *BOUNDS, *FRACTIONS, 1.0, 2.0, True, False)
        number = number if isinstance(number, float) or abs(number) < 2**63 else 7
        return Size(number) if type(number) is int and self.whole(0, 5) == 0 else number

    def size(self, number: int) -> int:
        return Size(number) if self.whole(0, 3) == 0 else number

    def dim(self, rank: int) -> int:
        return self.whole(-rank, rank - 1) if rank else self.pick(-1, 0)


def of_numbers(values: list[Any], dtype: torch.dtype) -> Tensor:
    wide = torch.tensor(values, dtype=torch.float64 if dtype in FLOATS else torch.int64)
    return wide.to(dtype)


Family = Callable[[Draws, torch.dtype], Case]
CASES: dict[Any, Family] = {}


def of(*targets: Any) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Enters a function under ``targets``; it is given the draws, the type of the first tensor, and the target."""

    def register(function: Callable[..., Case]) -> Callable[..., Case]:
        for target in targets:
            CASES[target] = lambda draws, dtype, target=target: function(draws, dtype, target)
        return function

    return register


def named(names: str, *overloads: str) -> list[Any]:
    packets = [getattr(aten, name) for name in names.split()]
    return [getattr(packet, overload) for packet in packets for overload in overloads if hasattr(packet, overload)]


# -- one element from those at the same place --------------------------------------------------------

COMPARISONS = "le lt ge gt eq ne"
GATES = "__and__ bitwise_and __or__ bitwise_or __xor__ bitwise_xor"


def operands(draws: Draws, dtype: torch.dtype, others: Sequence[Any] | None = None) -> tuple[Tensor, Tensor]:
    shape = draws.shape()
    pair = [draws.tensor(dtype, draws.under(shape)), draws.tensor(draws.type(dtype), draws.under(shape), others)]
    return (pair[0], pair[1]) if others or draws.pick(False, True) else (pair[1], pair[0])


def alpha(draws: Draws) -> dict[str, Any]:
    return {"alpha": draws.scalar()} if draws.whole(0, 2) == 0 else {}


@of(*named("add sub rsub", "Tensor"))
def _sum(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    left, right = operands(draws, dtype)
    return Case(
        (left, draws.scalar() if draws.whole(0, 3) == 0 and target != aten.rsub.Tensor else right), alpha(draws)
    )


@of(*named("add sub rsub", "Scalar"))
def _sum_of_scalar(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    args = (draws.tensor(dtype, draws.shape()), draws.scalar())
    return Case((*args, draws.scalar())) if draws.whole(0, 2) == 0 else Case(args)


@of(
    *named(f"mul {COMPARISONS} {GATES}", "Tensor"),
    *named("minimum maximum logical_and logical_or logical_xor", "default"),
)
def _binary(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    left, right = operands(draws, dtype)
    return Case((left, draws.scalar() if target == aten.mul.Tensor and draws.whole(0, 3) == 0 else right))


@of(*named(f"mul {COMPARISONS} {GATES}", "Scalar"))
def _with_scalar(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    truth = dtype == torch.bool and draws.pick(False, True)
    return Case((draws.tensor(dtype, draws.shape()), draws.pick(False, True) if truth else draws.scalar()))


DIVISORS = (1, 2, 3, 5, 7, 127, 0, -1, -3)


def rounding(draws: Draws, target: Any) -> dict[str, Any]:
    modes = ("floor", "trunc", "floor", "trunc", None)
    return {"rounding_mode": draws.pick(*modes)} if "mode" in target._overloadname else {}


@of(*named("remainder div", "Tensor"), aten.floor_divide.default, aten.div.Tensor_mode)
def _quotient(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    left, right = operands(draws, dtype, DIVISORS if draws.whole(0, 3) else None)
    if draws.whole(0, 2) == 0:
        right = draws.tensor(right.dtype, [], DIVISORS)
    if target in (aten.div.Tensor, aten.div.Tensor_mode) and draws.pick(False, True):
        return Case((left, draws.pick(draws.scalar(), *DIVISORS)), rounding(draws, target))
    return Case((left, right), rounding(draws, target))


@of(*named("remainder floor_divide div", "Scalar"), aten.div.Scalar_mode)
def _quotient_by_scalar(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    divisor = draws.scalar() if draws.whole(0, 3) == 0 else draws.pick(*DIVISORS)
    return Case((draws.tensor(dtype, draws.shape()), divisor), rounding(draws, target))


@of(*named("bitwise_not logical_not neg abs exp isinf isnan relu", "default"))
def _unary(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    return Case((draws.tensor(dtype, draws.shape()),))


@of(aten.clamp.default)
def _clamp(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor, low, high = draws.tensor(dtype, draws.shape()), draws.scalar(), draws.scalar()
    return draws.pick(
        Case((tensor, low, high)), Case((tensor, low)), Case((tensor, None, high)), Case((tensor,), {"max": high}),
        Case((tensor, low), {"max": high}), Case((tensor,), {"min": low}),
    )  # fmt: skip


@of(aten.clamp_min.default, aten.clamp_max.default)
def _clamp_one(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    return Case((draws.tensor(dtype, draws.shape()), draws.scalar()))


# -- made of numbers, converted, chosen --------------------------------------------------------------


@of(*named("arange", "default", "start", "start_step"))
def _arange(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    kwargs = {"dtype": draws.pick(dtype, torch.int64)} if draws.pick(False, True) else {}
    start, step = draws.pick(0, 1, -2, 126, 255, 2**31 - 2, 2**40, -7), draws.pick(1, 2, -1, -3, 1)
    end = start + step * draws.pick(0, 1, 2, 3) + draws.pick(0, step // abs(step))
    if target == aten.arange.default:
        return Case((draws.size(draws.pick(0, 1, 3, 5)),), kwargs)
    if target == aten.arange.start:
        return Case((draws.size(start), draws.size(start + draws.pick(0, 1, 3))), kwargs)
    if draws.whole(0, 4) == 0:
        return Case((start + 0.5, end + 1.0 * step, step), kwargs)
    return Case((draws.size(start), draws.size(end), step), kwargs)


def maybe_type(draws: Draws, dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": draws.type(dtype)} if draws.pick(False, True, True) else {}


@of(*named("ones zeros full", "default"))
def _filled(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    fill = (draws.scalar(),) if target == aten.full.default else ()
    if fill and draws.whole(0, 4) == 0:
        return Case((draws.shape(),), {"fill_value": fill[0], **maybe_type(draws, dtype)})
    return Case((draws.shape(), *fill), maybe_type(draws, dtype))


@of(*named("new_full new_ones new_zeros", "default"))
def _new(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    fill = (draws.scalar(),) if target == aten.new_full.default else ()
    return Case((draws.tensor(dtype, [2]), draws.shape(), *fill), maybe_type(draws, dtype))


@of(*named("full_like ones_like zeros_like", "default"))
def _like(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    fill = (draws.scalar(),) if target == aten.full_like.default else ()
    return Case((draws.tensor(dtype, draws.shape()), *fill), maybe_type(draws, dtype))


@of(aten.scalar_tensor.default)
def _scalar_tensor(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    return Case((draws.scalar(),), {"dtype": dtype} if draws.whole(0, 3) else {})


@of(aten._to_copy.default)
def _to_copy(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    return Case((draws.tensor(dtype, draws.shape()),), {"dtype": draws.pick(*TYPES)} if draws.whole(0, 7) else {})


@of(*named("where", "self", "ScalarOther", "ScalarSelf", "Scalar"))
def _where(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape()
    condition = draws.tensor(draws.pick(*[torch.bool] * 7, torch.uint8), draws.under(shape))
    yes, no = draws.tensor(dtype, draws.under(shape)), draws.tensor(draws.type(dtype), draws.under(shape))
    scalar = target._overloadname
    return Case((
        condition, draws.scalar() if scalar in ("ScalarSelf", "Scalar") else yes,
        draws.scalar() if scalar in ("ScalarOther", "Scalar") else no,
    ))  # fmt: skip


@of(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape()
    source, mask = draws.tensor(dtype, draws.under(shape)), draws.tensor(torch.bool, draws.under(shape))
    value = draws.scalar() if target == aten.masked_fill.Scalar else draws.tensor(draws.type(dtype), [])
    return Case((source, mask, value))


@of(aten.tril.default, aten.triu.default)
def _triangle(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    diagonal = () if draws.whole(0, 3) == 0 else (draws.size(draws.pick(-99, -2, -1, 0, 1, 2, 2**40)),)
    return Case((draws.tensor(dtype, draws.shape(2)), *diagonal))


@of(aten.constant_pad_nd.default)
def _pad(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape(1)
    pads = [draws.size(draws.pick(0, 1, 2, -1, -1, 0)) for _ in range(2 * draws.whole(0, len(shape)))]
    return Case((draws.tensor(dtype, shape), pads, *([draws.scalar()] if draws.pick(False, True) else [])))


# -- put in other places -----------------------------------------------------------------------------


@of(*named("clone alias detach lift_fresh_copy", "default"))
def _same(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    return Case((draws.tensor(dtype, draws.shape()),))


@of(aten.copy.default)
def _copy(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape()
    return Case((draws.tensor(draws.type(dtype), shape), draws.tensor(dtype, draws.under(shape))))


@of(aten.expand.default)
def _expand(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape()
    under = draws.under(shape)
    sizes = list(shape)
    for place in range(-len(under), 0):
        if under[place] == shape[place] and draws.pick(False, True):
            sizes[place] = -1
    return Case((draws.tensor(dtype, under), sizes))


@of(aten.repeat.default)
def _repeat(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape(0, 2)
    times = [draws.size(draws.pick(1, 2, 0, 3, 1)) for _ in range(draws.whole(len(shape), 3))]
    return Case((draws.tensor(dtype, shape), times))


@of(aten.unsqueeze.default)
def _unsqueeze(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape(0, 2)
    return Case((draws.tensor(dtype, shape), draws.whole(-len(shape) - 1, len(shape))))


@of(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = [draws.pick(1, 1, 2) for _ in range(draws.whole(0, 3))]
    dims = sorted({draws.whole(0, len(shape) - 1) for _ in shape[1:]}) if shape else []
    dim = draws.dim(len(shape)) if target == aten.squeeze.dim else [d - draws.pick(0, len(shape)) for d in dims]
    return Case((draws.tensor(dtype, shape), dim))


@of(aten.permute.default)
def _permute(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape()
    order = draws.random.sample(range(len(shape)), len(shape))
    return Case((draws.tensor(dtype, shape), [dim - draws.pick(0, len(shape)) for dim in order]))


@of(aten.transpose.int)
def _transpose(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape()
    return Case((draws.tensor(dtype, shape), draws.dim(len(shape)), draws.dim(len(shape))))


@of(aten.t.default)
def _t(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    return Case((draws.tensor(dtype, draws.shape(0, 2)),))


def edge(draws: Draws) -> Any:
    return draws.pick(None, 0, 1, 2, 3, -1, -2, -4, 99, -99, 2**63 - 1, -(2**63), Size(1), Size(-1))


@of(aten.slice.Tensor)
def _slice(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor = draws.tensor(dtype, draws.shape(1))
    dim, start, end, step = draws.dim(tensor.dim()), edge(draws), edge(draws), draws.pick(1, 1, 2, 3, 2**40)
    return draws.pick(
        Case((tensor, dim, start, end, step)), Case((tensor, dim, start, end)), Case((tensor,)),
        Case((tensor, dim), {"end": end}), Case((tensor,), {"start": start, "step": step}),
    )  # fmt: skip


@of(aten.slice_scatter.default)
def _slice_scatter(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor = draws.tensor(dtype, draws.shape(1))
    dim, start, end, step = draws.dim(tensor.dim()), edge(draws), edge(draws), draws.pick(1, 1, 1, 2)
    part = aten.slice.Tensor(tensor, dim, *(None if at is None else int(at) for at in (start, end)), step)
    source = draws.tensor(draws.pick(dtype, dtype, dtype, torch.int64), part.shape)
    return Case((tensor, source, dim), {"start": start, "end": end, "step": step})


@of(aten.select.int)
def _select(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor = draws.tensor(dtype, draws.shape(1))
    dim = draws.dim(tensor.dim())
    size = tensor.shape[dim]
    return Case((tensor, dim, draws.size(draws.whole(-size, max(size - 1, 0)))))


@of(aten.flip.default)
def _flip(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor = draws.tensor(dtype, draws.shape())
    rank = tensor.dim()
    dims = [dim - draws.pick(0, rank) for dim in range(rank) if draws.pick(False, True)]
    return Case((tensor, dims[::-1] if draws.pick(False, True) else dims))


@of(aten.index.Tensor)
def _index(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor = draws.tensor(dtype, [draws.pick(1, 2, 3) for _ in range(draws.whole(1, 3))])
    rank = draws.whole(0, 2)
    shape = [draws.pick(1, 2, 3) for _ in range(rank)]
    positions: list[Any] = []
    for size in tensor.shape[: draws.whole(1, tensor.dim())]:
        kind = draws.pick(*[torch.int64] * 8, torch.int32, torch.bool, torch.uint8)
        if draws.whole(0, 3) == 0:
            positions.append(None)
        elif kind in (torch.bool, torch.uint8):
            positions.append(draws.tensor(kind, [size], (0, 1)))
        else:
            past = draws.pick(*[0] * 9, 1)  # torch refuses what is past the end
            positions.append(draws.tensor(kind, draws.under(shape), tuple(range(-size, size + past))))
    return Case((tensor, positions))


@of(aten.index_select.default, aten.gather.default)
def _pick(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor = draws.tensor(dtype, [draws.pick(1, 2, 3) for _ in range(draws.whole(0, 3))])
    dim = draws.dim(tensor.dim())
    size = tensor.shape[dim] if tensor.dim() else 1
    shape = draws.shape(0, 1)
    if target == aten.gather.default:
        shape = [draws.whole(0, each) for each in tensor.shape]
        if shape:
            shape[dim] = draws.whole(0, 3)
    among = tuple(range(-1 if draws.whole(0, 9) == 0 else 0, size))
    return Case((tensor, dim, draws.tensor(draws.pick(torch.int64, torch.int64, torch.int32), shape, among)))


@of(aten.cat.default, aten.stack.default)
def _joined(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape(1 if target == aten.cat.default else 0)
    rank = len(shape) + (target == aten.stack.default)
    dim = draws.dim(rank)
    mixed, parts = draws.whole(0, 2) == 0, []
    for _ in range(draws.whole(1, 3)):
        extent = list(shape)
        if target == aten.cat.default:
            extent[dim] = draws.pick(0, 1, 2)
            extent = [0] if draws.whole(0, 9) == 0 else extent
        parts.append(draws.tensor(draws.type(dtype) if mixed else dtype, extent))
    return draws.pick(Case((parts, dim)), Case((parts,), {"dim": dim}), Case((parts,)))


@of(*named("view reshape _unsafe_view _reshape_copy", "default"))
def _view(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    before, after = draws.pick(
        ((2, 3), (6,)), ((6,), (2, 3)), ((6,), (3, -1)), ((2, 1, 3), (2, 3)), ((2, 3), (1, 2, 1, 3, 1)), ((1,), ()),
        ((), (1, 1)), ((4, 3), (6, 2)), ((4, 3), (2, 2, 3)), ((0, 3), (3, 0)), ((0,), (0, 2)), ((2, 0), (0,)),
        ((2, 2, 3), (4, 3)), ((2, 2, 3), (2, 6)), ((3, 4), (2, 6)), ((1, 1), (1,)), ((2, 3, 1), (3, 2)),
        ((0, 2), (-1, 2)),
    )  # fmt: skip
    return Case((draws.tensor(dtype, before), list(after)))


# -- of a whole row ----------------------------------------------------------------------------------


@of(aten.diff.default)
def _diff(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    shape = draws.shape(1)
    dim, order = draws.dim(len(shape)), draws.pick(*[1] * 8, 2, 0)

    def beside() -> Tensor | None:
        extent = list(shape)
        extent[dim] = draws.pick(*[1] * 6, 2)
        return draws.tensor(draws.type(dtype), extent)

    first, last = (beside() if draws.whole(0, 2) else None), (beside() if draws.whole(0, 4) == 0 else None)
    tensor = draws.tensor(dtype, shape)
    if draws.pick(False, True):
        return Case((tensor, order, dim, first, last))
    return Case((tensor,), {"dim": dim, "prepend": first})


def row(draws: Draws, dtype: torch.dtype) -> Tensor:
    """Mostly one constant along every row: what is varied has no model."""
    return draws.tensor(dtype, draws.shape(), draws.pick((0,), (1,), (0,), (1,), (0, 1), fitting(dtype)))


@of(aten.cumsum.default)
def _cumsum(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor = row(draws, dtype)
    if draws.whole(0, 9) == 0:  # a sum that may leave the narrow type
        tensor = torch.full((draws.pick(127, 128, 255, 256),), 1, dtype=dtype)
    return Case((tensor, draws.dim(tensor.dim())), maybe_type(draws, dtype) if draws.pick(False, True) else {})


@of(operator.getitem)
def _running(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor = row(draws, dtype)
    made = draws.pick(aten.cummax.default, aten.cummin.default)
    return Case((Made(made, (tensor, draws.dim(tensor.dim()))), draws.pick(0, 0, 0, 1, -1, -2)))


@of(aten.any.dim, aten.all.dim)
def _settled(draws: Draws, dtype: torch.dtype, target: Any) -> Case:
    tensor = row(draws, dtype)
    dim = draws.dim(tensor.dim())
    return draws.pick(Case((tensor, dim)), Case((tensor, dim, True)), Case((tensor, dim), {"keepdim": True}))


def cases(target: Any, dtypes: Sequence[torch.dtype] = TYPES) -> st.SearchStrategy[Case]:
    """Arguments of ``target``, the first tensor of one of ``dtypes``.

    hypothesis draws a seed and no more: its own draws take ten times as long, and repeat themselves.
    """

    def case(seed: int) -> Case:
        random = Random(f"{seed} {target}")
        made = CASES[target](Draws(random), random.choice(dtypes))
        hidden = tuple(random.random() < 0.5 for _ in range(3))
        return made._replace(hidden=hidden, by_letter=random.random() < 0.5)

    return st.integers(0, 2**64).map(case)
