"""What is known of a program's sizes: bounds of the shape symbols, and numbers that pose as sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

INT64_MAX = 2**63 - 1


def symbol_ranges(program: ExportedProgram) -> dict[str, tuple[int, int]]:
    """Inclusive bounds of the sizes of ``program``'s inputs; a side without a bound is 0 or 64 bits.

    torch.export writes 2 where it only means "not specialised to 0 or 1" and enforces nothing, so no lower
    bound above 1 is relied on: a proof on a wider range holds on the narrower one.  Of a number out of a tensor (u0)
    it records what the graph asserts (``torch._check``); an engine does not run assertions, so nothing is taken over.
    """
    ranges = {}
    for symbol, interval in program.range_constraints.items():
        if is_size(str(symbol)):
            low, high = interval.lower, interval.upper
            ranges[str(symbol)] = (
                min(int(low), 1) if low.is_Integer else 0,
                int(high) if high.is_Integer else INT64_MAX,
            )
    return ranges


READS_A_NUMBER = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


def asserted(program: ExportedProgram) -> set[str]:
    """Names of the nodes in ``program`` that are made of a number out of a tensor which an assertion ties to a size.

    ``torch._check(t.item() == x.shape[0])`` makes torch.export write the size wherever the number stood, for sizes of
    tensors too.  An engine does not run the assertion, so nothing is known of what is made of such a number.
    """
    found: set[Node] = set()
    for node in program.graph.nodes:
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
