"""The part of a graph that makes one attention mask, run alone in PyTorch for sizes and inputs of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg

from passes.proof.calls import AttentionCall
from passes.proof.sizes import INT64_MAX
from passes.proof.terms import size_expression

aten = torch.ops.aten
CPU = torch.device("cpu")
# These read the type of their first argument, or its shape, and never its values.
READS_NO_VALUES = frozenset(
    [
        aten.empty_like.default, aten.full_like.default, aten.new_empty.default, aten.new_full.default,
        aten.new_ones.default, aten.new_zeros.default, aten.ones_like.default, aten.zeros_like.default,
    ]
)  # fmt: skip


class NotRunnable(Exception):
    """The mask hangs on values that only a whole run of the model gives, such as its weights or its state."""


class _Step(NamedTuple):
    node: Node
    args: Any
    kwargs: Any
    last_read: tuple[Node, ...]
    """What nothing reads after it: a long mask's intermediates would fill the memory."""

    @property
    def call(self) -> Callable[..., Any]:
        target = self.node.target
        assert callable(target)
        return target


class MaskProgram:
    """A call's mask as a function of the shape symbols and of the run-time inputs whose content it reads.

    Sizes are put in wherever the graph asks for them, so only what makes the mask's *values* is run, on the CPU.
    """

    def __init__(self, call: AttentionCall, constants: Mapping[str, Tensor], inputs: frozenset[str]) -> None:
        """``constants``: the lifted constants by the name of their placeholder; ``inputs``: names of the run-time
        inputs.  Raises :class:`NotRunnable`."""
        assert call.mask is not None
        self.inputs: dict[str, Tensor] = {}
        """The inputs that the mask reads, as fake tensors: their type and symbolic shape."""
        self._arguments: list[tuple[str, Any]] = []
        self._elements: set[sympy.Expr] = set()
        self._backed = _symbols_of_placeholders(call.mask.graph)
        self.nodes: list[Node] = []
        """The nodes of the call's graph that are run."""
        self._mask = call.mask
        self._parameters: list[Node] = []
        self._steps = self._extract(call.mask, constants, inputs)
        self._scores = (*call.query.meta["val"].shape[:3], call.key.meta["val"].shape[2])
        expressions = [*map(size_expression, self._scores), *self._elements]
        expressions += [size_expression(value) for kind, value in self._arguments if kind == "size"]
        expressions += [size_expression(size) for value in self.inputs.values() for size in value.shape]
        self.symbols = sorted({symbol.name for expression in expressions for symbol in expression.free_symbols})
        """Names of the shape symbols."""
        if not self._backed.keys() >= set(self.symbols):
            raise NotRunnable("a size that only a run of the model gives")

    def ranges(self, proved: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Bounds of the symbols: those of the proof, but nothing shorter than the program takes.

        A proof widens lower bounds (:func:`passes.proof.sizes.symbol_ranges`).  A 2 stays widened: torch.export writes
        it for a 1 as well.
        """
        found = {}
        for name in self.symbols:
            low, high = proved.get(name, (0, INT64_MAX))
            least = self._backed[name]
            found[name] = (min(max(low, least if least > 2 else 0), high), high)
        return found

    def scores(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Batch, heads, queries and keys of the call."""
        return _shape(self._scores, sizes)

    def elements(self, sizes: Mapping[str, int]) -> int:
        """Elements of the largest tensor that a run with these sizes makes."""
        return max(_value(expression, sizes) for expression in self._elements)

    def shape(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of input ``name``."""
        return _shape(tuple(self.inputs[name].shape), sizes)

    def run(self, sizes: Mapping[str, int], inputs: Mapping[str, Tensor]) -> Tensor:
        """The mask, as the graph makes it; raises what PyTorch raises where the graph refuses the inputs."""
        arguments: list[Any] = []
        for kind, value in self._arguments:
            if kind == "size":
                arguments.append(_value(size_expression(value), sizes))
            elif kind == "input":
                arguments.append(inputs[value])
            elif kind == "type":  # takes no memory
                arguments.append(torch.zeros((), dtype=value.dtype).expand(_shape(tuple(value.shape), sizes)))
            else:
                arguments.append(value)
        values = dict(zip(self._parameters, arguments, strict=True))
        with torch.no_grad():
            for step in self._steps:
                args, kwargs = map_arg(step.args, values.__getitem__), map_arg(step.kwargs, values.__getitem__)
                values[step.node] = step.call(*args, **kwargs)
                for node in step.last_read:
                    del values[node]
        mask: Tensor = values[self._mask]
        return mask

    def _extract(self, mask: Node, constants: Mapping[str, Tensor], inputs: frozenset[str]) -> list[_Step]:
        """What is run, in order; what it is given goes to ``_parameters`` and ``_arguments``.

        Not a graph module: writing and compiling its code takes longer than all the runs of a second look.
        """
        needed, typed = self._needed(mask)
        for node in mask.graph.nodes:
            if node not in needed and node not in typed:
                continue
            self._count(node.meta.get("val"))  # a nested graph has none
            if node not in needed or node.op in ("placeholder", "get_attr") or self._is_size(node):
                self._parameters.append(node)
                self._arguments.append(self._argument(node, node in needed, constants, inputs))
            elif node.op == "call_function":
                self.nodes.append(node)
            else:
                raise NotRunnable(f"{node.op} {node.name}")
        steps: list[_Step] = []
        read = {mask}
        for node in reversed(self.nodes):
            last = tuple(source for source in node.all_input_nodes if source not in read)
            read.update(last)
            args, kwargs = map_aggregate(node.args, _on_cpu), map_aggregate(node.kwargs, _on_cpu)
            steps.append(_Step(node, args, kwargs, last))
        return steps[::-1]

    def _argument(
        self, node: Node, needed: bool, constants: Mapping[str, Tensor], inputs: frozenset[str]
    ) -> tuple[str, Any]:
        if self._is_size(node):
            return "size", node.meta["val"]
        if not needed:
            return "type", node.meta["val"]
        if node.name in constants:
            return "constant", constants[node.name].to(CPU)
        if node.name not in inputs:
            raise NotRunnable(f"{node.name} is neither an input nor a constant")
        self.inputs[node.name] = node.meta["val"]
        return "input", node.name

    def _needed(self, mask: Node) -> tuple[set[Node], set[Node]]:
        """The nodes whose values make the mask, and those of which only shape and type are read."""
        needed: set[Node] = set()
        typed: set[Node] = set()
        pending = [mask]
        while pending:
            node = pending.pop()
            if node in needed:
                continue
            needed.add(node)
            if self._is_size(node):
                continue
            sources = node.all_input_nodes
            if node.target in READS_NO_VALUES:
                typed.add(sources[0])
                sources = sources[1:]
            pending += sources
        return needed, typed - needed

    def _is_size(self, node: Node) -> bool:
        """Whether ``node`` is an integer that the shape symbols give."""
        value = node.meta.get("val")
        if not isinstance(value, int | torch.SymInt):
            return False
        return self._backed.keys() >= {symbol.name for symbol in size_expression(value).free_symbols}

    def _count(self, value: Any) -> None:
        for part in value if isinstance(value, tuple | list) else [value]:
            if isinstance(part, Tensor):
                count = sympy.sympify(sympy.prod([size_expression(size) for size in part.shape]))
                if self._backed.keys() >= {symbol.name for symbol in count.free_symbols}:
                    self._elements.add(count)


def _symbols_of_placeholders(graph: Graph) -> dict[str, int]:
    """The symbols that the inputs' shapes give -> the least value that the export declares."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            for size in value.shape if isinstance(value, Tensor) else [value]:
                if isinstance(size, torch.SymInt):
                    assert size.node.shape_env is not None
                    for symbol in size_expression(size).free_symbols:
                        least = size.node.shape_env.bound_sympy(symbol).lower
                        found[symbol.name] = int(least) if least.is_Integer else 0
    return found


def _on_cpu(argument: Any) -> Any:
    return CPU if isinstance(argument, torch.device) else argument


def _shape(shape: tuple[Any, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(_value(size_expression(size), sizes) for size in shape)


def _value(expression: sympy.Expr, sizes: Mapping[str, int]) -> int:
    return int(expression.xreplace({symbol: sympy.Integer(sizes[symbol.name]) for symbol in expression.free_symbols}))
