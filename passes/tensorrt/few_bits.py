"""Builds products with weights of fewer bits, and tables of them, so that the engine holds the small ones.

TensorRT takes a quantised constant behind a dequantisation and nowhere else.  Which forms are fast was measured on an
H100 with TensorRT-RTX 1.6 (docs/precision.md):

* A dequantisation with a scale for each channel in front of a product of many rows is slow (2048 rows by 2048 x 8192:
  599 us where one scale takes 282).  The scale of an output channel is a factor of the sum, so it may stand behind it:
  what is dequantised has one scale, a power of two, which rounds nothing, and each output is multiplied by the rest.
* A single row times int8 is fastest element by element and summed, as it is in fp16 (:mod:`passes.tensorrt.one_row`):
  TensorRT fuses the cast into that kernel (8192 x 2048: 11 us, as a matrix product 19; fp16 17).  Only so, too, do a
  product with the vocabulary and the look-up of a table that is tied to it read one constant; else the engine holds the
  largest weight of a model twice.
* A single row times int4 is fastest as the matrix product that it is (13 us; element by element 36).
* Of E4M3 the small weights are kept only where the rows are quantised too, right before the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.errors import RunError
from passes.graph.weights import put, value_of
from passes.precision import Kind
from passes.quantised import DEQUANTISED, ROWS_IN_E4M3
from passes.tensorrt.attention import as_tensor, reshaped
from passes.tensorrt.one_row import times_row
from passes.tensorrt.registry import Converter
from passes.tensorrt.versions import Stack

aten = torch.ops.aten
LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default
CONVERTED = (DEQUANTISED, ROWS_IN_E4M3)
READERS = (LINEAR, EMBEDDING)
"""What may read a quantised weight."""


@dataclass(frozen=True)
class Small:
    """A quantised weight on its way to the layer that reads it."""

    kind: Kind
    values: Tensor
    """[out, in]"""
    scales: Tensor
    """float32 [out, blocks]"""
    dtype: torch.dtype
    """Of the weight that it stands for."""

    @property
    def in_blocks(self) -> bool:
        return self.scales.shape[1] > 1

    @property
    def base(self) -> float:
        """The power of two next below its largest scale: of what stands in front of a product, and all others are
        multiplied on behind it, where nothing is then larger than the largest channel would be anyway."""
        return float(2 ** self.scales.max().log2().floor())

    @property
    def rest(self) -> Tensor:
        """[out] of ``dtype``: the scales over ``base``."""
        return (self.scales[:, 0] / self.base).to(self.dtype)


@dataclass(frozen=True)
class Rounded:
    """Rows [..., in] that are to be rounded to E4M3 at ``scale``, on their way to the product that reads them."""

    rows: Any
    scale: float


def weight_of(node: Any) -> Node | None:
    """The dequantisation that ``node``, a product or a look-up, reads as its weight; None if it reads none."""
    if not isinstance(node, Node) or node.target not in READERS:
        return None
    weight: Any = node.args[1 if node.target is LINEAR else 0]
    return weight if isinstance(weight, Node) and weight.target is DEQUANTISED else None


def reads_few_bits(node: Node) -> bool:
    """Whether ``node`` is a product or a look-up whose weight is quantised."""
    return weight_of(node) is not None


def share(graph: GraphModule) -> int:
    """Have what reads the same values, or rounds the same rows alike, read one operation, in place; returns how many
    there were too many."""
    first: dict[tuple[Any, ...], Node] = {}
    shared = 0
    for node in list(graph.graph.nodes):
        if node.target not in CONVERTED:
            continue
        parts = [value_of(graph, each) for each in node.args]
        key = tuple(a if part is None else part.data_ptr() for a, part in zip(node.args, parts, strict=True))
        if (kept := first.setdefault(key, node)) is not node:
            node.replace_all_uses_with(kept)
            graph.graph.erase_node(node)
            shared += 1
    return shared


def together(graph: GraphModule, products: list[Node]) -> Node | None:
    """One dequantisation of the weights of all ``products``, beside that of the first; None where they differ in more
    than their outputs."""
    found = [weight_of(product) for product in products]
    biases = [each for product in products for each in product.args[2:]]
    if any(each is not None and value_of(graph, each) is None for each in biases):
        return None
    if len({None if each is None else str((*each.args[2:], _sizes(graph, each))) for each in found} - {None}) != 1:
        return None
    weights = [each for each in found if each is not None]
    if len(weights) < len(products):
        return None
    parts = [[value_of(graph, weight.args[i]) for weight in weights] for i in range(2)]
    with torch.no_grad(), graph.graph.inserting_before(weights[0]):
        name = products[0].name
        values, scales = (
            put(graph, f"{name}_{what}", torch.cat([each for each in part if each is not None]))
            for what, part in zip(("values", "scales"), parts, strict=True)
        )
        whole = graph.graph.call_function(DEQUANTISED, (values, scales, *weights[0].args[2:]))
    whole.meta["val"] = weights[0].meta["val"].new_empty(values.meta["val"].shape)
    return whole


def _sizes(graph: GraphModule, weight: Node) -> tuple[int, int]:
    """Size of the input, and number of blocks."""
    values, scales = (value_of(graph, each) for each in weight.args[:2])
    assert values is not None and scales is not None
    return values.shape[1], scales.shape[1]


def convert(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...]) -> Any:
    """The parts of ``node``, one of :data:`CONVERTED`, from which :func:`multiply` and :func:`look_up` make layers."""
    if node.target is ROWS_IN_E4M3:
        rounded = Rounded(*args)
        if all(reads_few_bits(user) for user in node.users):
            return rounded
        return _in_e4m3(stack, ctx, node, rounded, rounded.rows)  # also for products with weights that are written out
    if others := [user for user in node.users if user.target not in READERS]:
        raise RunError("conversion", f"{others[0].name} ({others[0].target}) reads a quantised weight; a product may")
    values, scales, kind, dtype = args
    return Small(kind, values.detach().cpu(), scales.detach().cpu(), dtype)


def _flat(stack: Stack, ctx: Any, node: Node, rows: Any, shape: tuple[int, int]) -> Any:
    """``rows`` [..., in] in ``shape``; those that are to be rounded are rounded right before the product: TensorRT
    gives up the small weights where anything stands between."""
    if not isinstance(rows, Rounded):
        return reshaped(ctx.net, rows, shape)
    return _in_e4m3(stack, ctx, node, rows, reshaped(ctx.net, rows.rows, shape))


def _in_e4m3(stack: Stack, ctx: Any, node: Node, rounded: Rounded, rows: Any) -> Any:
    """``rows``, in one shape or another those of ``rounded``, quantised and dequantised."""
    scale = as_tensor(ctx, torch.tensor(rounded.scale, dtype=torch.float32), f"{node.name} [scale of rows]")
    small = ctx.net.add_quantize(rows, scale, stack.trt.DataType.FP8).get_output(0)
    return ctx.net.add_dequantize(small, scale, rows.dtype).get_output(0)


def multiply(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...], made: Made) -> Any:
    """The output [..., out] of ``node``: rows [..., in], a weight of few bits [out, in], and maybe a bias [out]."""
    net, trt = ctx.net, stack.trt
    rows, small, *bias = args
    out, inner = small.values.shape
    ahead = [size if isinstance(size, int) else -1 for size in node.args[0].meta["val"].shape[:-1]]  # type: ignore[union-attr]
    single = -1 not in ahead and prod(ahead) == 1
    weight = dequantise(stack, ctx, node, small, made)
    flat = _flat(stack, ctx, node, rows, (1 if single else -1, inner))
    if single and small.kind == "int8" and not small.in_blocks:
        result = reshaped(net, times_row(stack, net, weight, flat, whole=True), (1, out))
    else:
        none, turned = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
        result = net.add_matrix_multiply(flat, none, weight, turned).get_output(0)
    if not small.in_blocks:
        rest = as_tensor(ctx, small.rest.unsqueeze(0), f"{node.name} [scales]")
        result = net.add_elementwise(result, rest, trt.ElementWiseOperation.PROD).get_output(0)
    if bias and bias[0] is not None:
        added = as_tensor(ctx, bias[0].unsqueeze(0), f"{node.name} [bias]")
        result = net.add_elementwise(result, added, trt.ElementWiseOperation.SUM).get_output(0)
    return reshaped(net, result, (*ahead, out))


def look_up(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...], made: Made) -> Any:
    """The rows [..., in] of ``node``: a table of few bits [tokens, in], and which of its rows [...]."""
    net, (small, which) = ctx.net, args[:2]
    found = net.add_gather(dequantise(stack, ctx, node, small, made), which, 0).get_output(0)
    if small.in_blocks:
        return found
    rest = as_tensor(ctx, small.rest.unsqueeze(1), f"{node.name} [scales]")
    theirs = net.add_gather(rest, which, 0).get_output(0)
    return net.add_elementwise(found, theirs, stack.trt.ElementWiseOperation.PROD).get_output(0)


Made = dict[int, tuple[Any, Small]]
"""Of one network: where the values of a weight are -> its tensor [out, in], and the weight, so that they stay there."""


def dequantise(stack: Stack, ctx: Any, node: Node, small: Small, made: Made) -> Any:
    """``small`` as a tensor [out, in] of the network, without :attr:`Small.rest` where it is not in blocks; what was
    ``made`` before is given again."""
    address = small.values.data_ptr()
    if address not in made:
        scale = small.scales.to(small.dtype) if small.in_blocks else torch.tensor(small.base, dtype=small.dtype)
        at = as_tensor(ctx, scale, f"{node.name} [scale]")
        like = stack.torch_tensorrt.dtype.try_from(small.dtype).to(stack.trt.DataType)
        made[address] = (ctx.net.add_dequantize(_constant(stack, ctx, small), at, like).get_output(0), small)
    return made[address][0]


def _constant(stack: Stack, ctx: Any, small: Small) -> Any:
    """The values of ``small`` in TensorRT's own type, two of int4 in a byte, the first in its lower half."""
    trt, values = stack.trt, small.values.contiguous()
    if small.kind == "int4":
        pairs = values.view(torch.uint8).reshape(-1, 2) & 0xF
        values = pairs[:, 0] | (pairs[:, 1] << 4)
    kinds = {"int8": trt.DataType.INT8, "int4": trt.DataType.INT4, "e4m3": trt.DataType.FP8}
    weights = trt.Weights(kinds[small.kind], values.data_ptr(), small.values.numel())
    ctx.cpu_weights_reference_holder.append(values)  # TensorRT reads them when it builds
    return ctx.net.add_constant(tuple(small.values.shape), weights).get_output(0)


def converters(stack: Stack) -> list[Converter]:
    """Those of one network."""
    made: Made = {}
    return [
        Converter(CONVERTED, lambda ctx, node, args, _: convert(stack, ctx, node, args)),
        Converter((LINEAR,), lambda ctx, node, args, _: multiply(stack, ctx, node, args, made), reads_few_bits),
        Converter((EMBEDDING,), lambda ctx, node, args, _: look_up(stack, ctx, node, args, made), reads_few_bits),
    ]
