"""The form of a program in which masks are read: functional, with attention intact."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from passes.private.of_torch import Operation, is_composite, schema_of, writes

CASTS = (
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten.to.device,
    torch.ops.aten.type_as.default,
    torch.ops.aten.detach_.default,  # of a cache's empty tensors; changes no element
)


def prepare(program: ExportedProgram) -> ExportedProgram:
    """A functional form with attention intact: the form in which masks are read.

    ``run_decompositions({})`` gives it, by tracing the whole program again.  Most models are exported without a
    mutation or a nested graph; all it would do for them is to spell out ``to`` and ``reshape``, so that is done
    here, in place, in a hundredth of the time; and so are ``type_as`` and ``pad``, which it keeps.
    """
    if not all(_is_functional(node) for node in _operations(program)):
        program = program.run_decompositions({})
    for node in _operations(program):
        if node.target in CASTS and _stays_on_device(node):
            source, dtype = node.all_input_nodes[0], node.meta["val"].dtype
            node.args, node.kwargs = (source,), {}
            node.target = torch.ops.aten.alias.default
            if dtype != source.meta["val"].dtype:
                node.target, node.kwargs = torch.ops.aten._to_copy.default, {"dtype": dtype}
        elif node.target is torch.ops.aten.pad.default:
            given: tuple[Any, ...] = (*node.args, *("constant", None)[len(node.args) - 2 :])
            padded, sizes, mode, number = given
            if mode == "constant":
                node.target, node.args = torch.ops.aten.constant_pad_nd.default, (padded, sizes, number or 0)
    program.graph_module.recompile()
    return program


def _operations(program: ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]


def _stays_on_device(node: Node) -> bool:
    return bool(node.all_input_nodes[0].meta["val"].device == node.meta["val"].device)


def _is_functional(node: Node) -> bool:
    """Whether ``run_decompositions({})`` would keep ``node``, or :func:`prepare` can do what it would do."""
    target = node.target
    if node.op != "call_function":
        return False
    if not isinstance(target, Operation):  # arithmetic with sizes: operator.mul, math.floor, torch.sym_min
        return target.__module__ in ("_operator", "math") or target.__name__.startswith("sym_")  # type: ignore[union-attr]
    if target in CASTS:
        return _stays_on_device(node)
    aliases = any(returned.alias_info is not None for returned in schema_of(target).returns)
    decomposes = aliases and is_composite(target) and target is not torch.ops.aten.reshape.default
    return not writes(target) and not decomposes
