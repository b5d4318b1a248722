"""A second pair of eyes on every proof: the mask's own graph, run in PyTorch, must be what was proved of it.

The proof speaks about every length and every content of the inputs, but it speaks through our models of PyTorch's
operations, and a model can be wrong.  PyTorch itself cannot be, about itself.  So before a mask is dropped, the part of
the graph that makes it is run on a few concrete inputs and compared with the claim, element by element.  It proves
nothing (a few lengths are not all of them); what it finds is an error of ours, and the mask is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passes.proof.calls import AttentionCall
from passes.proof.mask import Causal, Chunked, Element, Full, LowerRight, Mask, Offset, OffsetWindow, Ring, Window
from passes.proof.mask_program import MaskProgram, NotRunnable

SMALL_RUNS = 24
LARGE_RUNS = 2
LARGE_ELEMENTS = 2**20
"""Of the largest tensor in a large run: 1024 queries and keys.  A graph without a dynamic length has one size only."""
STATIC_ELEMENTS = 2**26
FEW_SIZES = (1, 2, 3, 4, 5, 7, 8, 13)
MOST_SMALL = 2**16
"""Elements of the largest tensor in a small run: a window of up to 255 is looked at from both sides there."""

Claimed = Callable[[int, int, Mapping[str, Tensor]], Tensor]
"""Queries, keys and the inputs -> where the mask is claimed to attend: bool, broadcast over [batch, heads, L, S]."""


def _causal(queries: int, keys: int, offset: int | Tensor) -> Tensor:
    return torch.arange(keys) <= torch.arange(queries)[:, None] + offset


def _past(queries: int, keys: int, which: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of the past of each query, at place p among the keys k, those ``which`` says."""
    p = torch.arange(queries)[:, None] + keys - queries
    return _causal(queries, keys, keys - queries) & which(p, torch.arange(keys))


def claimed_of(mask: Mask) -> Claimed | None:
    """The table that ``mask`` is, where no more is needed for it than the sizes and an offset; None for any other."""
    match mask:
        case Full():
            return lambda queries, keys, inputs: torch.ones(queries, keys, dtype=torch.bool)
        case Causal():
            return lambda queries, keys, inputs: _causal(queries, keys, 0)
        case LowerRight():
            return lambda queries, keys, inputs: _causal(queries, keys, keys - queries)
        case Window(width):
            return lambda queries, keys, inputs: _past(queries, keys, lambda p, k: p - k < width)
        case Chunked(size):
            return lambda queries, keys, inputs: _past(queries, keys, lambda p, k: k // size == p // size)
        case Offset(source, element) if element is not None:
            return _placed(source, element, lambda age, place, keys: age >= 0)
        case OffsetWindow(source, element, width) if element is not None:
            return _placed(source, element, lambda age, place, keys: (age >= 0) & (age < width))
        case Ring(source, element, width) if element is not None:
            return _placed(source, element, lambda age, place, keys: (age % keys <= place) & (age % keys < width))
    return None


def _placed(source: str, element: Element, which: Callable[[Tensor, Tensor, int], Tensor]) -> Claimed:
    """The keys that ``which`` says: of how far each lies behind the query's place, of that place, of their number."""
    at: Any = tuple(slice(None) if each == "b" else each for each in element)

    def table(queries: int, keys: int, inputs: Mapping[str, Tensor]) -> Tensor:
        offset = inputs[source][at]
        place = torch.arange(queries)[:, None] + (offset[:, None, None, None] if "b" in element else offset)
        return which(place - torch.arange(keys), place, keys)

    return table


Given = Mapping[str, Callable[[Tensor], Tensor]]
"""Inputs of which something is assumed -> what keeps it, made of any content."""


@dataclass(frozen=True)
class Look:
    """What was seen."""

    runs: int
    """On how many inputs the mask's graph was run; 0 where it cannot be run by itself."""
    disagreement: str = ""
    """The first element that is not what was proved, with the input that shows it; empty where there is none."""


def look(
    call: AttentionCall,
    constants: Mapping[str, Tensor],
    ranges: Mapping[str, tuple[int, int]],
    claimed: Claimed,
    given: Given,
    bounded: bool = False,
) -> Look:
    """Run the mask of ``call`` on small and large inputs of the profile ``ranges`` and compare it with ``claimed``.

    ``constants``: the lifted constants by the name of their placeholder.  Every other placeholder that the mask reads,
    weights and state among them, is given the contents that are hardest on integers and comparisons; ``bounded``: of
    integers only those within half their type's range.
    """
    assert call.mask is not None
    graph = call.mask.graph
    others = frozenset(node.name for node in graph.nodes if node.op == "placeholder") - constants.keys()
    try:
        program = MaskProgram(call, constants, others)
    except NotRunnable:
        return Look(0)
    runs = 0
    for sizes, variant in _chosen(program, ranges):
        inputs = {
            name: _content(program.shape(name, sizes), value.dtype, variant + 3 * place, bounded)
            for place, (name, value) in enumerate(program.inputs.items())
        }
        inputs = {name: given[name](content) if name in given else content for name, content in inputs.items()}
        _, _, queries, keys = program.scores(sizes)
        try:
            mask = program.run(sizes, inputs)
        except (RuntimeError, IndexError, ValueError):  # the program itself refuses such inputs
            continue
        runs += 1
        if (place := _first_difference(mask, claimed(queries, keys, inputs))) is not None:
            return Look(runs, _described(place, mask, queries, keys, inputs))
    return Look(runs)


def _first_difference(mask: Tensor, attends: Tensor) -> tuple[int, ...] | None:
    """The first element of ``mask``, broadcast, that does not attend or block as ``attends`` says."""
    if mask.dtype == torch.bool:
        wrong = mask != attends
    else:  # anything but 0 and a blocked entry is a bias
        wrong = torch.where(attends, mask != 0, ~(mask <= torch.finfo(mask.dtype).min))
    if not wrong.any():
        return None
    return tuple(int(place) for place in wrong.nonzero()[0])


def _described(place: tuple[int, ...], mask: Tensor, queries: int, keys: int, inputs: Mapping[str, Tensor]) -> str:
    value = mask.expand(*mask.shape[:-2], queries, keys)[place].item()
    contents = "".join(f", {name} = {str(content.tolist())[:80]}" for name, content in inputs.items())
    return f"query {place[-2]}, key {place[-1]} of {queries} queries and {keys} keys is {value}{contents}"


# -- what is tried -----------------------------------------------------------------------------------


def _chosen(program: MaskProgram, ranges: Mapping[str, tuple[int, int]]) -> Iterator[tuple[dict[str, int], int]]:
    """Sizes, and which contents: :data:`SMALL_RUNS` small ones and :data:`LARGE_RUNS` large ones."""
    bounds = program.ranges(ranges)
    if not bounds:
        if program.elements({}) <= STATIC_ELEMENTS:
            yield from (({}, variant) for variant in range(SMALL_RUNS if program.inputs else 1))
        return
    interesting = {edge for number in _numbers(program) for edge in (number - 1, number, number + 1)}

    def fitting(most: int) -> Callable[[dict[str, int]], bool]:
        return lambda sizes: program.elements(sizes) <= most

    every = list(_sizes(bounds, sorted({*FEW_SIZES, *interesting})))
    small = list(filter(fitting(MOST_SMALL), every))
    least = {name: low for name, (low, _) in bounds.items()}
    for run in range(SMALL_RUNS):
        yield (small[run % len(small)] if small else least), run
    large = sorted(filter(fitting(LARGE_ELEMENTS), [*every, *_sizes(bounds, _powers())]), key=lambda s: sum(s.values()))
    yield from ((sizes, run) for run, sizes in enumerate(reversed(large[-LARGE_RUNS:])))


def _powers() -> list[int]:
    return [2**exponent for exponent in range(4, 21)]


def _sizes(bounds: Mapping[str, tuple[int, int]], wanted: list[int]) -> Iterator[dict[str, int]]:
    """``wanted`` within the bounds, and both ends: each for every symbol at once, then against each other."""
    choices = [sorted({min(max(size, low), high) for size in (low, *wanted, high)}) for low, high in bounds.values()]
    longest = max(map(len, choices))
    shifts = range(1) if len(choices) == 1 else range(3)
    for shift, place in itertools.product(shifts, range(longest)):
        yield {
            name: options[(place + shift * number) % len(options)]
            for number, (name, options) in enumerate(zip(bounds, choices, strict=True))
        }


def _numbers(program: MaskProgram) -> set[int]:
    """Integers written in the mask's graph, such as a window's width."""
    found: set[int] = set()

    def note(argument: Any) -> Any:
        if isinstance(argument, int) and not isinstance(argument, bool) and 1 < argument < 2**20:
            found.add(argument)
        return argument

    for node in program.nodes:
        torch.fx.node.map_aggregate((node.args, node.kwargs), note)
    return found


def _content(shape: tuple[int, ...], dtype: torch.dtype, variant: int, bounded: bool) -> Tensor:
    """Content number ``variant`` of an input: positions, ones, zeros, extremes of its type, repeated, descending."""
    places = torch.arange(shape[-1] if shape else 1).expand(shape or (1,)).reshape(shape)
    if dtype == torch.bool:
        flags = (places >= 0, places < 0, places % 2 == 0, places > 0, places.flip(-1) > 0 if shape else places > 0)
        return flags[variant % len(flags)].clone()
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    part = 2 if bounded and not dtype.is_floating_point else 1
    numbers: list[Any] = [
        places,
        1,
        0,
        places.flip(-1) if shape else 3,
        places // 2,
        limits.max // part,
        -(-limits.min // part),
    ]
    numbers += [-1, places % 3, places + 7, 255, 2]
    if dtype.is_floating_point:
        numbers += [-torch.inf, torch.inf, 0.5, torch.nan]
    number = numbers[variant % len(numbers)]
    if isinstance(number, Tensor):
        return number.to(dtype).clone()
    if not dtype.is_floating_point:
        number = max(limits.min, min(limits.max, number))
    return torch.full(shape, number, dtype=dtype)
