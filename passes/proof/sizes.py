"""What is known of a program's sizes: bounds of the shape symbols, and numbers that pose as sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

INT64_MAX = 2**63 - 1


def symbol_ranges(program: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Inclusive bounds of the sizes of ``program``'s inputs; a side without a bound is 0 or 64 bits.

    torch.export writes 2 where it only means "not specialised to 0 or 1" and enforces nothing, so no lower
    bound above 1 is relied on: a proof on a wider range holds on the narrower one.  Of a number out of a tensor (u0)
    it records what the graph asserts (``torch._check``); an engine does not run assertions, so nothing is taken over.
    """
    return _bounds(program.range_constraints)


def ranges_of_inputs(graph: Graph) -> dict[str, tuple[int, int]]:
    """The same of a graph without a program: the bounds of its inputs' sizes in their own shape environment."""
    found: dict[Any, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else [value]:
            if isinstance(size, torch.SymInt) and size.node.shape_env is not None:
                bounds = size.node.shape_env.bound_sympy
                found |= {symbol: bounds(symbol) for symbol in size.node.expr.free_symbols}
    return _bounds(found)


def bounds_of(size: Any) -> tuple[int | None, int | None]:
    """Least and most of ``size``, a number or a symbol of a traced graph; None for a side that has no bound."""
    if not isinstance(size, torch.SymInt):
        return size, size
    if size.node.shape_env is None:
        return None, None
    found = size.node.shape_env.bound_sympy(size.node.expr)
    least, most = (int(side) if side.is_Integer else None for side in (found.lower, found.upper))
    return least, most


def _bounds(intervals: Mapping[Any, Any]) -> dict[str, tuple[int, int]]:
    return {
        str(symbol): (
            min(int(interval.lower), 1) if interval.lower.is_Integer else 0,
            int(interval.upper) if interval.upper.is_Integer else INT64_MAX,
        )
        for symbol, interval in intervals.items()
        if is_size(str(symbol))
    }


READS_A_NUMBER = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


def asserted(graph: Graph) -> set[str]:
    """Names of the nodes in ``graph`` that are made of a number out of a tensor which an assertion ties to a size.

    ``torch._check(t.item() == x.shape[0])`` makes torch.export write the size wherever the number stood, for sizes of
    tensors too.  An engine does not run the assertion, so nothing is known of what is made of such a number.
    """
    found: set[Node] = set()
    for node in graph.nodes:
        tied = node.target in READS_A_NUMBER and not _is_unbacked(node.meta.get("val"))
        if tied or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return {node.name for node in found}


def _is_unbacked(value: Any) -> bool:
    """Whether ``value`` is a symbol of its own, or no integer at all."""
    if not isinstance(value, torch.SymInt):
        return not isinstance(value, int)
    return bool(value.node.expr.is_Symbol) and not is_size(value.node.expr.name)


def is_size(symbol: str) -> bool:
    """Whether torch's symbol of this name is the size of a dimension (s0); others (u0) are numbers out of a tensor."""
    return symbol.startswith("s")
