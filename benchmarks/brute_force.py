"""What a mask is, found by running its part of the graph on concrete inputs: the check on every proof.

Each class of :mod:`passes.proof.masks` is written down here a second time, as a comparison of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from benchmarks.call_forms import LONGEST, PADDED, POSITIONS, CallForm, contents
from passes.proof.calls import AttentionCall
from passes.proof.counterexample import Counterexample
from passes.proof.mask import Arbitrary
from passes.proof.masks import Proof, Status


@dataclass(frozen=True)
class Run:
    """One mask on one set of inputs."""

    mask: Tensor
    """[B, H, L, S]: bool (may attend), or the float that is added to the scores."""
    inputs: dict[str, Tensor]
    past: int = 0
    """Keys in the cache before the call."""

    @property
    def attends(self) -> Tensor | None:
        """[B, H, L, S] bool; None where a float mask holds anything but 0 (attend) and -inf or the lowest (do not)."""
        if self.mask.dtype == torch.bool:
            return self.mask
        blocked = self.mask <= torch.finfo(self.mask.dtype).min
        return ~blocked if bool((blocked | (self.mask == 0)).all()) else None

    def rows(self, chosen: Tensor) -> Run:
        return Run(self.mask[chosen], {name: value[chosen] for name, value in self.inputs.items()}, self.past)

    @property
    def queries(self) -> Tensor:
        return torch.arange(self.mask.shape[2])[:, None]

    @property
    def keys(self) -> Tensor:
        return torch.arange(self.mask.shape[3])

    @property
    def alignments(self) -> dict[str, Tensor]:
        """Position [L, 1] of each query among the keys: by either corner of the mask, or by the cache's state."""
        queries, keys = self.mask.shape[2:]
        offsets = {"upper_left": 0, "lower_right": keys - queries, "cache": self.past}
        return {name: self.queries + offset for name, offset in offsets.items()}


class MaskGraph:
    """The part of a prepared program that makes the masks of ``calls``."""

    def __init__(self, program: ExportedProgram, calls: list[AttentionCall]) -> None:
        self.calls = calls
        self.signature = program.graph_signature
        self.placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        self.spec = program.call_spec.in_spec
        wanted = {call.mask for call in calls if call.mask is not None}
        pending = list(wanted)
        while pending:
            new = set(pending.pop().all_input_nodes) - wanted
            wanted |= new
            pending += new
        self.nodes = [node for node in program.graph.nodes if node in wanted]
        names = {**self.signature.inputs_to_lifted_tensor_constants, **self.signature.inputs_to_buffers}
        names |= self.signature.inputs_to_parameters
        self.state = {
            placeholder: program.constants[name] if name in program.constants else program.state_dict[name]
            for placeholder, name in names.items()
        }

    def run(self, inputs: dict[str, Any], state: dict[str, Tensor]) -> list[Tensor | None]:
        """Each call's mask [B, H, L, S]; ``state`` replaces buffers by a part of their names."""
        leaves = iter(pytree.tree_leaves(inputs))
        values: dict[Node, Any] = {}
        sizes: dict[Any, int] = {}
        for node in self.placeholders:
            value: Any = next(leaves) if node.name in self.signature.user_inputs else self.state.get(node.name)
            for part, replacement in state.items():
                value = replacement if part in node.name else value
            values[node] = value
            if isinstance(value, Tensor):
                pairs = zip(node.meta["val"].shape, value.shape, strict=True)
                sizes |= {_expression(size): actual for size, actual in pairs if isinstance(size, torch.SymInt)}
        for node in self.nodes:
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
        return [None if call.mask is None else values[call.mask].expand(_scores(call, sizes)) for call in self.calls]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _scores(call: AttentionCall, sizes: dict[Any, int]) -> list[int]:
    """The sizes [B, H, L, S] of the call's scores."""
    shape = (*call.query.meta["val"].shape[:3], call.key.meta["val"].shape[2])
    return [size if isinstance(size, int) else int(_expression(size).xreplace(sizes)) for size in shape]


def runs(graph: MaskGraph, form: CallForm, shape: str) -> Iterator[list[Run | None]]:
    """Each call's mask, for every size and content of the inputs of ``form`` that the graph runs on.

    It may run on fewer than were asked for: falcon's alibi with a static cache needs a cache that is filled exactly.
    """
    for queries, past in form.sizes(shape):
        state = {"cumulative_length": torch.tensor(past)} if form.cache == "static" else {}
        for inputs in contents(form, queries, past):
            given: dict[str, Any] = dict(inputs)
            if form.cache == "dynamic":
                given["past"] = graph_past(graph, past)
            try:
                masks = graph.run(given, state)
            except RuntimeError:  # the model itself fails there
                break
            yield [None if mask is None else Run(mask, inputs, past) for mask in masks]


def confirms(graph: MaskGraph, index: int, example: Counterexample) -> bool:
    """Whether the mask of call ``index`` says what ``example`` says, and the causal mask the opposite."""
    given: dict[str, Tensor] = {}
    for node in graph.placeholders:
        if node.name in graph.signature.user_inputs:
            value = node.meta["val"]
            content = example.inputs.get(node.name)
            shape = [_evaluated(size, example.sizes) for size in value.shape]
            zeros = torch.zeros(shape, dtype=value.dtype)
            given[node.name] = zeros if content is None else torch.tensor(content, dtype=value.dtype).expand(shape)
    state = {name: torch.tensor(content) for name, content in example.inputs.items() if name not in given}
    mask = graph.run(given, state)[index]
    if mask is None:
        return False
    value = mask[example.batch, example.head, example.query, example.key]
    attends = bool(value) if value.dtype == torch.bool else bool(value > torch.finfo(value.dtype).min)
    if example.bias is not None:
        return attends and float(value) == example.bias != 0
    return attends == example.attends and attends != (example.key <= example.query)


def _evaluated(size: Any, values: dict[str, int]) -> int:
    """A size under the shape symbols' values, 1 where they say nothing."""
    expression = _expression(size)
    if isinstance(expression, int):
        return expression
    return int(expression.xreplace({symbol: values.get(symbol.name, 1) for symbol in expression.free_symbols}))


def graph_past(graph: MaskGraph, length: int) -> list[Tensor]:
    """Zeros [B, H, length, D] for every key and value of the cache that the program takes."""
    names = [name for name in graph.signature.user_inputs if str(name).startswith("past")]
    shapes = [node.meta["val"].shape for node in graph.placeholders if node.name in names]
    return [torch.zeros(shape[0], shape[1], length, shape[3]) for shape in shapes]


# -- the classes, once more ----------------------------------------------------------------------------


def _equal(run: Run, expected: Tensor) -> bool:
    attends = run.attends
    return attends is not None and bool((attends == expected).all())


def _causal_from(run: Run, position: Tensor, condition: Tensor | bool = True) -> bool:
    return _equal(run, (run.keys <= position) & condition)


def _full(run: Run) -> set[Any]:
    return {()} if _equal(run, torch.tensor(True)) else set()


def _causal(run: Run) -> set[Any]:
    return {()} if _causal_from(run, run.queries) else set()


def _lower_right(run: Run) -> set[Any]:
    return {()} if _causal_from(run, run.alignments["lower_right"]) else set()


def _offset(run: Run) -> set[Any]:
    """Every row of the batch is causal from some position on: its first query sees the keys up to it."""
    if run.attends is None:
        return set()
    position = run.attends[:, :1, :1].sum(-1, keepdim=True) - 1  # [B, 1, 1, 1]
    return {()} if _causal_from(run, run.queries + position) else set()


def _placed(run: Run, sees: Callable[[Tensor, Tensor, int], Tensor], places: range) -> set[Any]:
    """The widths with which ``sees`` (place, key, width) is every row of the batch, each from some place on."""
    if run.attends is None:
        return set()
    rows = run.attends.expand(*run.attends.shape[:2], len(run.queries), len(run.keys.flatten()))
    found = set()
    for width in range(1, LONGEST + 1):
        tables = [sees(run.queries + place, run.keys, width) for place in places]
        found |= {width} if all(any(bool((row == table).all()) for table in tables) for row in rows) else set()
    return found


def _offset_window(run: Run) -> set[Any]:
    keys = run.keys.numel()
    return _placed(run, lambda place, key, width: (key <= place) & (place - key < width), range(-keys, keys + 1))


def _ring(run: Run) -> set[Any]:
    keys = run.keys.numel()

    def sees(place: Tensor, key: Tensor, width: int) -> Tensor:
        age = (place - key) % keys
        return (age <= place) & (age < width)

    return _placed(run, sees, range(3 * keys))


def _window(run: Run) -> set[Any]:
    return {
        (corner, width)
        for corner, position in run.alignments.items()
        for width in range(1, LONGEST + 1)
        if _causal_from(run, position, position - run.keys < width)
    }


def _chunked(run: Run) -> set[Any]:
    return {
        (corner, size)
        for corner, position in run.alignments.items()
        for size in range(1, LONGEST + 1)
        if _causal_from(run, position, run.keys // size == position // size)
    }


def _padding(run: Run) -> set[Any]:
    """What the last query sees of a key, every later one sees: the same keys are blocked in every row."""
    if run.attends is None:
        return set()
    last = run.attends[:, :1, -1:]
    return {corner for corner, position in run.alignments.items() if _causal_from(run, position, last)}


def _packed(run: Run) -> set[Any]:
    positions = run.inputs.get(POSITIONS)
    if positions is None or run.mask.shape[2] != run.mask.shape[3]:
        return set()
    segment = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    same = (segment[:, :, None] == segment[:, None, :])[:, None]
    return {()} if _causal_from(run, run.queries, same) else set()


def _bias(run: Run) -> set[Any]:
    return {()} if run.mask.is_floating_point() else set()


MEANINGS: dict[str, Callable[[Run], set[Any]]] = {
    "full": _full, "causal": _causal, "causal_lower_right": _lower_right, "causal_offset": _offset,
    "sliding_window_offset": _offset_window, "ring": _ring,
    "sliding_window": _window, "chunked": _chunked, "padding": _padding, "packed": _packed, "bias": _bias,
}  # fmt: skip
"""Class -> the parameters (width, size, corner) with which it describes a run.  It describes a mask where one choice
of parameters describes every run."""
DROPPABLE = ("causal", "causal_lower_right", "full")
CONDITIONS: dict[str, Callable[[Run], Tensor]] = {
    "no_padding": lambda run: (run.inputs[PADDED] == 1).all(-1),
    "contiguous_positions": lambda run: (run.inputs[POSITIONS].diff(dim=-1) == 1).all(-1),
}
"""Condition -> the rows [B] on which it holds."""


def parameters(kind: str, seen: Iterable[Run]) -> set[Any]:
    """The parameters with which ``kind`` describes every run; none describes no runs."""
    found: set[Any] | None = None
    for run in seen:
        here = MEANINGS[kind](run)
        found = here if found is None else found & here
        if not found:
            break
    return found or set()


def describes(kind: str, seen: Iterable[Run]) -> bool:
    return bool(parameters(kind, seen))


def truths(seen: list[Run]) -> list[str]:
    """The classes of :data:`DROPPABLE` that describe every run."""
    return [kind for kind in DROPPABLE if describes(kind, seen)]


def contradiction(proof: Proof, seen: list[Run]) -> str | None:
    """What the runs of one mask say against ``proof``; None where they agree."""
    if not seen:
        return "its graph runs on no input: nothing was checked"
    if proof.status is Status.PROVED and not isinstance(proof.mask, Arbitrary) and not describes(proof.mask.name, seen):
        return f"called {proof.mask.name}, and brute force disagrees"
    if proof.status is Status.PROVED and isinstance(proof.mask, Arbitrary):
        return "an arbitrary mask has nothing to prove"
    if proof.conditions:
        held = []
        for run in seen:
            rows = torch.stack([CONDITIONS[name](run) for name in proof.conditions]).all(0)
            held += [run.rows(rows)] if rows.any() else []
        if not truths(held):
            return f"not causal where {' and '.join(proof.conditions)} hold"
    return None
