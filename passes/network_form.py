"""Brings a lowered graph into the form that Torch-TensorRT's converters need, without changing what it computes.

* A -1 in the sizes of a view hides from TensorRT what the trace knows: its attention layer and the update of its cache
  want the number of heads, and some views with -1 and a dynamic size are refused altogether.
* What ``empty`` holds is undefined, so zeros will do; there is no layer for it.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten

VIEWS = (aten._reshape_copy.default, aten.view.default, aten.reshape.default, aten.expand.default)


def prepare(graph: GraphModule) -> None:
    """Write known sizes and defined contents into ``graph``, in place."""
    for node in graph.graph.nodes:
        if node.target in VIEWS and "val" in node.meta:
            _write_known_sizes(node)
        elif node.target is aten.empty.memory_format:
            node.target, node.args = aten.full.default, (node.args[0], 0)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    graph.recompile()


def _write_known_sizes(node: Node) -> None:
    source, asked, *rest = node.args
    known = node.meta["val"].shape
    sizes = [size if isinstance(size, int) else wanted for wanted, size in zip(asked, known, strict=True)]  # type: ignore[arg-type, call-overload]
    node.args = (source, sizes, *rest)
