"""Builds attention over windows and chunks from native layers: the words of :mod:`passes.graph.local_attention`, which
says how a prompt is cut into blocks, for tensors of a network.

A block's queries are a sequence of its own: blocks take their place among the batches.  Sizes that are known are
numbers, and others small tensors of the network with bounds (:class:`Size`), so that an engine for one length has
neither shapes to calculate nor a mask to make.  The mask of a block is a constant that all layers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.graph.local_attention import (
    CHUNKED,
    WINDOWED,
    band,
    in_chunks,
    in_windows,
    in_windows_behind,
    last_keys,
)
from passes.tensorrt.attention import (
    NativeLayer,
    as_tensor,
    native_layer,
    scaled,
    static_heads,
    with_channels,
)
from passes.tensorrt.fused_kernels import FusedKernels, extent
from passes.tensorrt.versions import Stack

CONVERTED = (WINDOWED, CHUNKED)


@dataclass(frozen=True)
class Size:
    """A whole number that is known when the engine runs, between ``least`` and ``most``."""

    words: InNetwork
    tensor: Any
    """[1] int64."""
    least: int
    most: int

    def __add__(self, other: int | Size) -> Size:
        low, high = _bounds(other)
        return self.words.calculated("SUM", self, other, self.least + low, self.most + high)

    def __sub__(self, other: int | Size) -> Size:
        low, high = _bounds(other)
        return self.words.calculated("SUB", self, other, max(self.least - high, 0), self.most - low)

    def __mul__(self, other: int | Size) -> Size:
        low, high = _bounds(other)
        return self.words.calculated("PROD", self, other, self.least * low, self.most * high)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: int | Size) -> Size:
        low, high = _bounds(other)
        return self.words.calculated("FLOOR_DIV", self, other, self.least // high, self.most // low)


AnySize = int | Size


def _bounds(size: AnySize) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size.least, size.most)


@dataclass(frozen=True)
class Rows:
    """A tensor [batch, heads, rows, channels] of the network."""

    tensor: Any
    batch: AnySize
    heads: int
    rows: AnySize
    channels: int

    @property
    def sizes(self) -> tuple[AnySize, ...]:
        return self.batch, self.heads, self.rows, self.channels


Masks = dict[tuple[int, int, int], Any]


@dataclass
class InNetwork:
    """The words for tensors of the network of Torch-TensorRT's conversion context ``ctx``."""

    stack: Stack
    ctx: Any
    name: str
    kernels: FusedKernels
    batch: int
    masks: Masks
    """Those that the network has: size of a block, reach, width -> [1, 1, size, (1 + reach) * size] bool."""
    made: list[NativeLayer] = field(default_factory=list)

    # -- sizes -----------------------------------------------------------------------------------

    def calculated(self, operation: str, a: AnySize, b: AnySize, least: int, most: int) -> Size:
        kind = getattr(self.stack.trt.ElementWiseOperation, operation)
        tensor = self.ctx.net.add_elementwise(self._as_tensor(a), self._as_tensor(b), kind).get_output(0)
        return Size(self, tensor, least, most)

    def length(self, x: Rows) -> AnySize:
        return x.rows

    def least(self, a: AnySize, b: AnySize) -> AnySize:
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return self.calculated("MIN", a, b, *map(min, zip(_bounds(a), _bounds(b), strict=True)))

    def most(self, a: AnySize, b: AnySize) -> AnySize:
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        return self.calculated("MAX", a, b, *map(max, zip(_bounds(a), _bounds(b), strict=True)))

    def _as_tensor(self, size: AnySize) -> Any:
        return (
            as_tensor(self.ctx, torch.tensor([size]), f"{self.name} [{size}]") if isinstance(size, int) else size.tensor
        )

    def _together(self, sizes: Sequence[AnySize]) -> Any:
        return self.ctx.net.add_concatenation([self._as_tensor(size) for size in sizes]).get_output(0)

    # -- rows and blocks -------------------------------------------------------------------------

    def first(self, x: Rows, count: AnySize) -> Rows:
        return x if count is x.rows or count == x.rows else self._cut(x, 0, count, fill=False)

    def filled(self, x: Rows, start: AnySize, count: AnySize) -> Rows:
        known = [size for size in (x.rows, start, count) if isinstance(size, int)]
        return self._cut(x, start, count, fill=len(known) < 3 or known[1] < 0 or known[1] + known[2] > known[0])

    def _cut(self, x: Rows, start: AnySize, count: AnySize, fill: bool) -> Rows:
        sizes = (x.batch, x.heads, count, x.channels)
        return Rows(self._slice(x.tensor, (0, 0, start, 0), sizes, fill), *sizes)

    def blocks(self, x: Rows, count: AnySize, size: AnySize, reach: int) -> Rows:
        assert isinstance(x.batch, int)
        each = self._reshaped(x.tensor, (x.batch, x.heads, count + reach, size, x.channels))
        near = [
            self._slice(each, (0, 0, i, 0, 0), (x.batch, x.heads, count, size, x.channels)) if reach else each
            for i in range(1 + reach)
        ]
        together = near[0]
        if reach:
            layer = self.ctx.net.add_concatenation(near)
            layer.axis, together = 3, layer.get_output(0)
        sizes = (count * x.batch, x.heads, size * (1 + reach), x.channels)
        return Rows(self._reshaped(together, sizes, before=(0, 2, 1, 3, 4)), *sizes)

    def joined(self, x: Rows, like: Rows, count: AnySize, size: AnySize) -> Rows:
        apart = self._reshaped(x.tensor, (like.batch, count, x.heads, size, x.channels))
        sizes = (like.batch, x.heads, count * size, x.channels)
        return Rows(self._reshaped(apart, sizes, before=(0, 2, 1, 3, 4)), *sizes)

    def behind(self, first: Rows, second: Rows) -> Rows:
        layer = self.ctx.net.add_concatenation([first.tensor, second.tensor])
        layer.axis = 2
        return Rows(layer.get_output(0), first.batch, first.heads, first.rows + second.rows, first.channels)

    def _slice(self, tensor: Any, start: Sequence[AnySize], sizes: Sequence[AnySize], fill: bool = False) -> Any:
        rank = len(sizes)
        if all(isinstance(size, int) for size in (*start, *sizes)):
            layer = self.ctx.net.add_slice(tensor, tuple(start), tuple(sizes), (1,) * rank)
        else:
            layer = self.ctx.net.add_slice(tensor, (0,) * rank, (1,) * rank, (1,) * rank)
            layer.set_input(1, self._together(start))
            layer.set_input(2, self._together(sizes))
        if fill:
            layer.mode = self.stack.trt.SampleMode.FILL
        return layer.get_output(0)

    def _reshaped(self, tensor: Any, sizes: Sequence[AnySize], before: tuple[int, ...] | None = None) -> Any:
        """``tensor`` in the shape ``sizes``, its axes put in the order ``before`` before that."""
        layer = self.ctx.net.add_shuffle(tensor)
        if before is not None:
            layer.first_transpose = before
        if sum(not isinstance(size, int) for size in sizes) <= 1:
            layer.reshape_dims = tuple(size if isinstance(size, int) else -1 for size in sizes)
        else:
            layer.set_input(1, self._together(sizes))
        return layer.get_output(0)

    # -- attention -------------------------------------------------------------------------------

    def attention(self, query: Rows, key: Rows, value: Rows) -> Rows:
        return self._native(query, key, value, "upper_left", None)

    def attention_in_band(self, query: Rows, key: Rows, value: Rows, size: AnySize, reach: int, width: int) -> Rows:
        widest = _bounds(size)[1]
        if (widest, reach, width) not in self.masks:
            whole = band(widest, reach, width)[None, None]
            self.masks[widest, reach, width] = as_tensor(self.ctx, whole, f"{self.name} [band]")
        mask = self.masks[widest, reach, width]
        if not isinstance(size, int):  # the band of a smaller block is the corner of a larger one's
            mask = self._slice(mask, (0,) * 4, (1, 1, size, size * (1 + reach)))
            mask = self._known(mask, (1, 1, size, size))
        return self._native(query, key, value, "none", mask)

    def attention_in_place(
        self, query: Rows, key: Rows, value: Rows, count: AnySize, size: int, reach: int, width: int, past: AnySize
    ) -> Rows:
        span = (1 + reach) * size
        seen = as_tensor(self.ctx, last_keys(size, reach, width)[None, None], f"{self.name} [last keys]")
        if isinstance(past, int) and past >= reach * size:
            return self._native(query, key, value, "none", seen)
        most = _bounds(count)[1]
        starts = torch.arange(most).view(most, 1, 1, 1) * size - reach * size
        places = as_tensor(self.ctx, starts + torch.arange(span), f"{self.name} [places]")
        if not isinstance(count, int):
            places = self._slice(places, (0,) * 4, (count, 1, 1, span))
        shift = self._reshaped(self._as_tensor(past), (1, 1, 1, 1))
        before = as_tensor(self.ctx, torch.full((1, 1, 1, 1), -1), f"{self.name} [before the text]")
        kinds, net = self.stack.trt.ElementWiseOperation, self.ctx.net
        there = net.add_elementwise(places, shift, kinds.SUM).get_output(0)
        there = net.add_elementwise(there, before, kinds.GREATER).get_output(0)
        mask = net.add_elementwise(there, seen, kinds.AND).get_output(0)
        if self.batch > 1:  # the blocks of a row stand together
            layer = net.add_concatenation([mask] * self.batch)
            layer.axis, mask = 0, layer.get_output(0)
        return self._native(query, key, value, "none", mask)

    def _native(self, query: Rows, key: Rows, value: Rows, causal: str, mask: Any) -> Rows:
        tensors = tuple(self._known(each.tensor, each.sizes) for each in (query, key, value))
        traced: Any = [[_bounds(size) for size in x.sizes] for x in (query, key)]
        output, layer = native_layer(self.stack, self.ctx, self.name, tensors, causal, mask, traced, self.kernels)
        self.made.append(layer)
        return Rows(output, query.batch, query.heads, query.rows, value.channels)

    def _known(self, tensor: Any, sizes: Sequence[AnySize]) -> Any:
        """``tensor`` with the sizes that are known where they are; what is cut at run time has forgotten them."""
        if all(have == size for have, size in zip(tuple(tensor.shape), sizes, strict=True) if isinstance(size, int)):
            return tensor
        layer = self.ctx.net.add_shuffle(tensor)
        layer.reshape_dims = tuple(size if isinstance(size, int) else 0 for size in sizes)  # 0 copies the size
        return layer.get_output(0)


def convert(
    stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...], kernels: FusedKernels, masks: Masks
) -> tuple[Any, list[NativeLayer]]:
    """The output tensor [B, Hq, L, Dv] of ``node``, one of :data:`CONVERTED`, and the native layers that make it.

    ``args``: those of ``node`` with tensors in the place of nodes; ``masks``: of the same network, to which ours go.
    """
    query, key, value = (static_heads(ctx.net, tensor, node.args[i]) for i, tensor in enumerate(args[:3]))
    scale, channels = args[-1], value.shape[3]
    if scale != 1.0:
        query = scaled(stack, ctx, query, scale, node)
    most = max(query.shape[3], channels)
    tensors = (with_channels(stack, ctx.net, tensor, most) for tensor in (query, key, value))
    words = InNetwork(stack, ctx, node.name, kernels, int(query.shape[0]), masks)
    traced: list[Any] = [each.meta["val"].shape[2] for each in node.args[:2]]  # type: ignore[union-attr]
    is_whole = bool(statically_known_true(traced[0] == traced[1]))
    length = _length(words, query, traced[0])
    keys = length if is_whole else _length(words, key, traced[1])
    sizes = ((length, query), (keys, key), (keys, value))
    rows: list[Any] = [
        Rows(each, int(like.shape[0]), int(like.shape[1]), count, most)
        for each, (count, like) in zip(tensors, sizes, strict=True)
    ]
    cut: Any = in_chunks if node.target is CHUNKED else in_windows if is_whole else in_windows_behind
    out = cut(words, *rows, *args[3 : 5 if cut is in_windows_behind else -1])
    output = with_channels(stack, ctx.net, words._known(out.tensor, out.sizes), channels)
    return output, words.made


def _length(words: InNetwork, query: Any, traced: Any) -> AnySize:
    if query.shape[2] >= 0:
        return int(query.shape[2])
    sizes = words.ctx.net.add_shape(query).get_output(0)
    return Size(words, words._slice(sizes, (2,), (1,)), *extent(-1, traced))
