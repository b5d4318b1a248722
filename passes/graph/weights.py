"""The weights of a graph: to read one, and to put one in."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node


def value_of(graph: GraphModule, node: Any) -> Tensor | None:
    """The weight that ``node`` stands for in ``graph``; None if it is no weight."""
    return attrgetter(str(node.target))(graph) if isinstance(node, Node) and node.op == "get_attr" else None


def put(graph: GraphModule, name: str, value: Tensor) -> Node:
    """A node, where nodes are inserted now, that stands for ``value``: a new buffer of ``graph``, called ``name`` or,
    where something else is, nearly so."""
    while hasattr(graph, name):
        name += "_"
    graph.register_buffer(name, value)
    node = graph.graph.get_attr(name)
    node.meta["val"] = value
    return node
