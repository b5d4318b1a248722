"""Refuses a program with a tensor of more elements than 32 bits count.

Each dimension of a tensor may be small and their product beyond what an index inside of a kernel reaches: the logits of
16384 tokens, the keys of 16 long rows.  TensorRT-RTX 1.6 builds such an engine without a word.  A bool mask of
65536 x 65536 was seen right there (H100), so masks may be larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from passes.errors import RunError
from passes.graph import ops
from passes.graph.local_attention import WINDOWED
from passes.proof.sizes import bounds_of

MOST = 2**31 - 1
"""Elements at most of a tensor that is no mask: an int32 counts them."""


def refuse_larger(program: ExportedProgram) -> None:
    """Raise :class:`RunError` of kind ``too_large`` where a tensor of numbers that ``program`` computes with has more
    than :data:`MOST` elements at the longest lengths of its inputs."""
    node, elements = max(((node, at_most(node)) for node in _numbers(program)), key=lambda found: found[1])
    if elements <= MOST:
        return
    shape = " x ".join(map(str, _largest(node)))
    raise RunError(
        "too_large",
        f"{node.name} has {shape} elements, above the {MOST} up to which engines were seen right; set a smaller "
        "shape.max or shape.batch, or run prompts in chunks (cache=in_engine cache.chunk=2048)",
    )


def _numbers(program: ExportedProgram) -> Iterator[Node]:
    """The nodes of ``program`` that a result hangs on and that are not made of truth values.

    Not the mask of an attention call that was proved to do without it, whatever it is made of: it stays in the graph as
    the evidence, and is no part of the engine."""
    pending, seen = list(program.graph.find_nodes(op="output")), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        evidence = node.args[3] if node.target is ops.NATIVE and node.args[4] != "none" else None
        pending += [source for source in node.all_input_nodes if source is not evidence]
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
            yield node


def at_most(node: Node) -> int:
    """Elements at most of the largest tensor that ``node`` computes; 0 of what is no tensor, or has no bound."""
    return prod(_largest(node))


def _largest(node: Node) -> list[int]:
    """Its sizes: what ``node`` gives, or the keys of a window's blocks, each of which has its own copy of those that it
    sees (:func:`passes.graph.local_attention.in_windows`)."""
    found = [_sizes(node)]
    if node.target is WINDOWED:
        arguments: Any = node.args
        _, key, _, width, block, *_ = arguments
        batch, heads, rows, channels = sizes if len(sizes := _sizes(key)) == 4 else [0] * 4
        reach = -(-width // block)
        found.append([batch * -(-rows // block), heads, (1 + reach) * block, channels])
    return max(found, key=prod)


def _sizes(node: Any) -> list[int]:
    value = node.meta.get("val")
    sizes = [bounds_of(size)[1] for size in value.shape] if isinstance(value, torch.Tensor) else [None]
    return [0] if None in sizes else sizes  # type: ignore[return-value]
