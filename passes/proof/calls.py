"""One view, :class:`AttentionCall`, over every form in which attention appears in a graph.

``torch.export`` leaves ``aten.scaled_dot_product_attention``; torch's own decompositions turn it into the kernel that
torch would pick on the device at hand.  All of them take (query, key, value) first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import z3
from torch.fx import GraphModule, Node

from passes.errors import RunError
from passes.proof.mask import Mask
from passes.proof.op_kinds import VIEW_LIKE
from passes.proof.symbolic import Evaluator
from passes.proof.terms import in_range

aten = torch.ops.aten

# Form -> position of (mask, is_causal) among its arguments; source: torch's native_functions.yaml.
FORMS: dict[Any, tuple[int | None, int | None]] = {
    aten.scaled_dot_product_attention.default: (3, 5),
    aten._scaled_dot_product_efficient_attention.default: (3, 6),
    aten._scaled_dot_product_cudnn_attention.default: (3, 6),
    aten._scaled_dot_product_flash_attention.default: (None, 4),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (None, 4),
}


@dataclass(frozen=True)
class AttentionCall:
    """One attention call.  Shapes: query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv]."""

    index: int
    node: Node
    mask: Node | None
    is_causal: bool
    scale: float
    """Factor of the scores; the default D**-0.5 is filled in."""
    enable_gqa: bool
    sees_keys: bool = False
    """Whether every row is known to see a key (:func:`passes.graph.blank_rows.every_row_sees_a_key`)."""
    proved: Mask | None = None
    """What its mask was proved to be, once that is known."""

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def op(self) -> str:
        return str(self.node.target)

    @property
    def query(self) -> Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def key(self) -> Node:
        return self.node.args[1]  # type: ignore[return-value]

    @property
    def value(self) -> Node:
        return self.node.args[2]  # type: ignore[return-value]

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads, key-value heads."""
        return self.query.meta["val"].shape[1], self.key.meta["val"].shape[1]

    @property
    def head_size(self) -> int:
        return int(self.query.meta["val"].shape[-1])


def find_calls(graph_module: GraphModule, needed: bool = True) -> list[AttentionCall]:
    """Every attention call of ``graph_module``, in the order of execution.

    Raises :class:`passes.errors.RunError` of kind ``no_attention`` where there is none and one is ``needed``.
    """
    calls: list[AttentionCall] = []
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in FORMS:
            calls.append(_view(len(calls), node))
    if needed and not calls:
        raise RunError(
            "no_attention",
            "the traced graph has no attention op; load the model with attn_implementation=sdpa (eager writes it out)",
        )
    return calls


THROUGH = {
    *VIEW_LIKE, aten.alias.default, aten.slice.Tensor, aten._to_copy.default, aten.to.dtype, aten.type_as.default,
    aten.dropout.default,
}  # fmt: skip
"""What lies between a softmax and the product that it weighs."""
SOFTMAX = {aten._softmax.default, aten.softmax.int}
PRODUCTS = {aten.bmm.default, aten.matmul.default, aten.mm.default}


def written_out(graph_module: GraphModule) -> list[str]:
    """Names of the softmaxes in ``graph_module`` that weigh the rows of a product: attention without a call."""
    found = []
    for softmax in graph_module.graph.nodes:
        pending = [softmax] if softmax.target in SOFTMAX else []
        seen: set[Node] = set(pending)
        while pending:
            made = pending.pop()
            for user in made.users:
                if user.target in PRODUCTS and user.args[0] is made:
                    found.append(softmax.name)
                    pending.clear()
                    break
                if user.target in THROUGH and user not in seen:
                    seen.add(user)
                    pending.append(user)
    return found


def _view(index: int, node: Node) -> AttentionCall:
    mask_at, causal_at = FORMS[node.target]

    def argument(position: int | None, name: str, default: Any) -> Any:
        if position is not None and len(node.args) > position:
            return node.args[position]
        return node.kwargs.get(name, default)

    mask = argument(mask_at, "attn_mask", None)
    if mask is None:
        mask = node.kwargs.get("attn_bias")
    if node.target is aten.scaled_dot_product_attention.default and argument(4, "dropout_p", 0.0):
        raise RunError("unsupported_op", f"{node.name}: attention with dropout; trace the model in eval mode")
    scale: Any = node.kwargs.get("scale")
    query: Any = node.args[0]
    return AttentionCall(
        index=index,
        node=node,
        mask=mask,
        is_causal=bool(argument(causal_at, "is_causal", False)),
        scale=float(scale) if scale is not None else 1 / math.sqrt(query.meta["val"].shape[-1]),
        enable_gqa=bool(node.kwargs.get("enable_gqa", False)),
    )


def unrepeated(node: Node, ranges: dict[str, tuple[int, int]]) -> Node | None:
    """The [B, Hkv, S, D] tensor that ``node`` [B, Hq, S, D] repeats head by head (Hugging Face's ``repeat_kv``).

    Proved, not matched: ``node[b, h, s, d] == source[b, h // group, s, d]`` for every index, which is the order
    that grouped-query attention has.  A tiled repetition (``h % Hkv``) is another function and gives None.
    """
    source: Any = node
    while isinstance(source, Node) and source.target in VIEW_LIKE:
        source = source.args[0]
        if isinstance(source, Node) and source.meta["val"].dim() == 4 and _repeats(source, node, ranges):
            return source
    return None


def _repeats(source: Node, node: Node, ranges: dict[str, tuple[int, int]]) -> bool:
    few, many = source.meta["val"].shape[1], node.meta["val"].shape[1]
    if not (isinstance(few, int) and isinstance(many, int) and few < many and many % few == 0):
        return False
    evaluator = Evaluator(ranges, opaque=frozenset([source]))
    b, h, s, d = index = tuple(z3.Ints("b h s d"))
    claim = evaluator.at(node, index) == evaluator.at(source, (b, h / (many // few), s, d))
    return evaluator.proves(claim, *in_range(evaluator, node, index))


def native_gqa(call: AttentionCall, ranges: dict[str, tuple[int, int]]) -> bool:
    """Hand ``call`` its keys and values without ``repeat_kv``, in place, where both are proved to repeat the same
    number of heads; whether they are.  Its node then takes fewer heads of them than of the query."""
    key, value = unrepeated(call.key, ranges), unrepeated(call.value, ranges)
    if key is None or value is None or key.meta["val"].shape[1] != value.meta["val"].shape[1]:
        return False
    call.node.args = (call.node.args[0], key, value, *call.node.args[3:])
    if call.node.target is aten.scaled_dot_product_attention.default:  # the kernels' own forms have no word for it
        call.node.update_kwarg("enable_gqa", True)
    return True
