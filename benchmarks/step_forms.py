"""Whole decoder layers at one token, each part in one of several forms, as networks for :mod:`benchmarks.kernels`.

A form is three words with dots between them, ``PRODUCTS.ATTENTION.KEPT``; ``PRODUCTS@xN`` adds up N
pieces of the inputs side by side before their sum is taken, and ``ATTENTION@N`` N pieces of the keys:

*products*: ``plain`` is matrix products; ``eight`` the same of eight rows, seven of them zero; ``mix`` multiplies
siblings (query, key and value; gate and up) as matrix products and the others element by element, with sums; ``merged``
puts siblings' weights together into one product, element by element.
*attention*: ``native`` is the attention layer with a bool mask; ``mm16`` is matrix products over 16 pieces of the keys,
each with a softmax of its own (Flash-Decoding); ``ms16`` has its scores element by element; ``whole`` is one softmax
over all keys, scores and values element by element, the cache of the values with the keys' axis last; ``wide`` is the
same with fp32 sums; ``turned`` is ``wide`` with the cache of the values as that of the keys, turned when it is read.
``fused`` is ``wide`` with a softmax for each channel of the values, so that it becomes part of their kernel, and
``fused_half`` that with weights in fp16.
*kept*: what is not computed anew in every block of the product that reads it, but written by a scatter, which TensorRT
does not fuse into what follows: ``n`` normed rows, ``s`` the activated row of the gate, ``q`` rotated queries, ``a``
the result of attention; ``-`` for none.  ``o``: the new token is left out of the cache, its attention is added, and its
keys and values are outputs, to be put into the cache by somebody else.  ``d``: the reciprocal root of a norm is
multiplied on behind the product.  ``j``: query and key are normed and rotated together.  ``g``: a norm's gain is part
of the weights behind it.  ``u``: the softmax is divided before the values are weighted, not behind.  ``m``: the mean of
a norm is computed for each output of the product behind it, in its kernel, and divides what comes out; ``k`` that for
query, key and value only; ``b``: the mean alone is computed before, and divides behind.  ``r``: what a layer adds to
its input is added up together with it, in one sum.  ``h``: the activated gate is a factor of the other product's terms.
``w``: the terms of a sum are products in fp32.  ``i``: weights of int8 with a scale an output; ``f``: of int4 in blocks
of 128; ``c``: the scales are multiplied on behind.  ``t``: the softmax's weights are rounded before they are added up.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from benchmarks.kernel_forms import BLOCKED, HEADS, SIZES, Net, put_together

STEP_LAYERS = {"llama3_1b": 4, "qwen2_5_0_5b": 8, "qwen3_0_6b": 8}
STEP = (
    "plain.native.-",
    "plain.mm16.-",
    "plain.wide.-",
    "plain.wide.j",
    "eight.native.-",
    "eight.wide.-",
    "eight.wide.j",
    "eight.wide.jg",
    "mix.wide.-",
    "merged.native.j",
    "merged.native.jg",
    "merged.mm16.-",
    "merged.ms16.-",
    "merged.turned.-",
    "merged.whole.-",
    "merged.wide.-",
    "merged.wide.p",
    "merged.wide.q",
    "merged.wide.d",
    "merged.wide.j",
    "merged.wide.jg",
    "merged.wide.ju",
    "merged.wide.jgu",
    "merged.wide.jgr",
    "merged.wide.jgmr",
    "merged.fused.jg",
    "merged.fused_half.jg",
    "merged.fused.jgr",
    "merged.fused.jgkr",
    "merged.fused.jgmr",
    "merged.fused.jgri",
    "merged.fused.jgrf",
    "merged.fused.jgmri",
    "merged.wide.jgh",
    "merged.wide.jgt",
    "merged@x2.wide.jg",
    "merged@x4.wide.jg",
    "merged@x8.wide.jg",
    "merged.wide@4.jg",
    "merged@x4.wide@4.jg",
    "merged@x4.wide@4.jgh",
    "merged@x8.wide@4.jgh",
    "merged.wide.jgi",
    "merged.wide.jgrhi",
    "merged.wide.jgwhi",
    "merged.wide.jwbrhi",
    "merged@x4.wide@4.jgi",
    "merged@x4.wide@4.jgwhi",
    "merged@x8.wide@4.jgwhi",
    "merged@x4.wide@4.jwbrhi",
    "eight.wide.jgi",
    "eight.wide.jgf",
)
EPSILON = 1e-5
SCALED = 64.0


class StepNet(Net):
    """The layers of a decoder, from the hidden state of one token to that of the last layer."""

    def __init__(self, model: str, form: str, keys: int) -> None:
        super().__init__()
        products, self.attention, self.flags = form.split(".")
        self.products, _, self.pieces = products.partition("@x")
        self.attention, _, self.key_pieces = self.attention.partition("@")
        self.keys = keys
        self.heads, self.kv_heads, self.size = HEADS[model]
        self.position = self.input("position", (1,), "int")
        self.cos, self.sin = (self.input(name, (1, 1, 1, self.size)) for name in ("cos", "sin"))
        places, position = (
            self.const(np.arange(keys, dtype=np.int32).reshape(1, keys)),
            self.reshape(self.position, (1, 1)),
        )
        self.unseen = self.binary(places, position, "GREATER")
        if "o" in self.flags:
            self.unseen = self.binary(self.unseen, self.binary(places, position, "EQUAL"), "OR")

    @property
    def bits(self) -> int:
        return 8 if "i" in self.flags else 4 if "f" in self.flags else 16

    @property
    def in_rows(self) -> bool:
        return self.attention in ("whole", "wide", "turned", "fused", "fused_half")

    def half(self, value: float, rank: int) -> Any:
        return self.const(np.full((1,) * rank, value, np.float16))

    def cast(self, x: Any, kind: str) -> Any:
        return self.net.add_cast(x, {"half": self.trt.float16, "float": self.trt.float32}[kind]).get_output(0)

    def keep(self, x: Any, kind: str) -> Any:
        if kind not in self.flags:
            return x
        count = int(np.prod(x.shape))
        data, index = self.const(np.zeros((1, count), np.float16)), self.const(np.zeros((1, 1), np.int32))
        scattered = self.net.add_scatter(data, index, self.reshape(x, (1, count)), self.trt.ScatterMode.ND)
        return self.reshape(scattered.get_output(0), tuple(x.shape))

    def root(self, x: Any) -> Any:
        """The reciprocal root of the mean square of x's last axis, fp32."""
        wide = self.cast(x, "float")
        two = self.const(np.full((1,) * len(x.shape), 2, np.float32))
        square = self.binary(wide, two, "POW") if "p" in self.flags else self.binary(wide, wide, "PROD")
        mean = self.reduce(square, "AVG", len(x.shape) - 1)
        epsilon = self.const(np.full((1,) * len(mean.shape), EPSILON, np.float32))
        return self.unary(self.unary(self.binary(mean, epsilon), "SQRT"), "RECIP")

    def norm(self, x: Any, gain: np.ndarray) -> Any:
        wide = self.binary(self.cast(x, "float"), self.root(x), "PROD")
        if gain.ndim == 1:
            gain = gain.reshape((1,) * (len(x.shape) - 1) + (-1,))
        return self.binary(self.cast(wide, "half"), self.const(gain), "PROD")

    def product(self, x: Any, weight: np.ndarray, summed: bool = True, kind: str = "half") -> Any:
        """x [1, in] times weight [out, in] transposed, added up in ``kind``: [1, out]."""
        if self.products == "eight":
            rows = self.cat([x, self.const(np.zeros((7, x.shape[1]), np.float16))], 0)
            return self.slice(self.matmul(rows, self.weight(weight, self.bits), tb=True), (0, 0), (1, weight.shape[0]))
        if "w" in self.flags or self.pieces:
            return self.reshape(self.cast(self.summed(x, weight), "half"), (1, len(weight)))
        if not summed or self.products == "plain":
            return self.matmul(x, self.weight(weight, self.bits), tb=True)
        terms = self.cast(self.binary(self.weight(weight, self.bits), x, "PROD"), kind)
        return self.reshape(self.reduce(terms, "SUM", 1, keep=False), (1, weight.shape[0]))

    def added(self, x: Any, row: Any, weight: np.ndarray) -> Any:
        """x [1, out] and the product of row [1, in] with weight [out, in]."""
        if "r" not in self.flags:
            return self.binary(x, self.product(row, weight))
        total = self.summed(row, weight, plus=self.reshape(self.cast(x, "float"), (len(weight), 1)))
        return self.reshape(self.cast(total, "half"), (1, len(weight)))

    def summed(self, row: Any, weight: np.ndarray, plus: Any = None, times: Any = None) -> Any:
        """Row [1, in] times weight [out, in] and ``plus`` [out, 1], or times ``times``, in one sum: [out, 1], fp32."""
        scales = np.full((len(weight), 1), 1, np.float32)
        if "c" in self.flags:
            scales = np.abs(weight.astype(np.float32)).max(1, keepdims=True) / 127
            weight = (weight.astype(np.float32) / scales).astype(np.float16)
        terms = self.terms(row, weight)
        if plus is not None:
            count = terms.shape[1]
            terms = self.binary(terms, self.binary(plus, self.const(1 / (count * scales)), "PROD"))
        if times is not None:
            terms = self.binary(terms, times, "PROD")
        total = self.reduce(terms, "SUM", 1)
        return self.binary(total, self.const(scales), "PROD") if "c" in self.flags else total

    def terms(self, row: Any, weight: np.ndarray) -> Any:
        """What is to be added up for row [1, in] times weight [out, in], fp32: [out, in], or the sums of its pieces
        [out, width] where there is a width."""
        inner = weight.shape[1]
        width = inner // int(self.pieces or 1)
        return self.side_by_side(
            self.whole_terms(self.slice(row, (0, at), (1, width)), np.ascontiguousarray(weight[:, at : at + width]))
            for at in range(0, inner, width)
        )

    def side_by_side(self, pieces: Iterable[Any]) -> Any:
        """The sum of tensors of one shape, two and two."""
        pieces = list(pieces)
        while len(pieces) > 1:
            pairs = [self.binary(*pair) for pair in zip(pieces[::2], pieces[1::2], strict=False)]
            pieces = pairs + pieces[len(pairs) * 2 :]
        return pieces[0]

    def whole_terms(self, row: Any, weight: np.ndarray) -> Any:
        if "w" in self.flags:
            wide = row if row.dtype == self.trt.float32 else self.cast(row, "float")
            return self.binary(self.weight(weight, self.bits, wide=True), wide, "PROD")
        return self.cast(self.binary(self.weight(weight, self.bits), row, "PROD"), "float")

    def gated(self, x: Any, gain: np.ndarray, gate: np.ndarray, up: np.ndarray) -> Any:
        """The activated row [1, inner] of the norm of x: the gate's product, and the activation in the other's sum."""
        gate, up = ((each.astype(np.float32) * gain.astype(np.float32)).astype(np.float16) for each in (gate, up))
        wide, root = self.cast(x, "float"), self.root(x)
        behind = "b" in self.flags
        row = x if behind else self.cast(self.binary(wide, root, "PROD"), "half")
        if "w" in self.flags:
            row = wide if behind else self.binary(wide, root, "PROD")
        first = self.summed(row, gate)
        first = self.binary(first, root, "PROD") if behind else first
        first = self.binary(
            first, self.net.add_activation(first, self.trt.ActivationType.SIGMOID).get_output(0), "PROD"
        )
        first = self.binary(first, root, "PROD") if behind else first
        total = self.summed(row, up, times=first)
        return self.reshape(self.cast(total, "half"), (1, len(gate)))

    def normed_behind(self, x: Any, weight: np.ndarray) -> Any:
        """The product of the norm of x [1, in], without a gain, with weight [out, in]; the mean for each output."""
        wide, ones = self.cast(x, "float"), self.const(np.ones((len(weight), 1), np.float32))
        terms = self.cast(self.binary(self.weight(weight, self.bits), x, "PROD"), "float")
        mean = self.reduce(self.binary(ones, self.binary(wide, wide, "PROD"), "PROD"), "AVG", 1, keep=False)
        root = self.unary(self.binary(mean, self.const(np.full((1,), EPSILON, np.float32))), "SQRT")
        merged = self.binary(self.reduce(terms, "SUM", 1, keep=False), self.unary(root, "RECIP"), "PROD")
        return self.reshape(self.cast(merged, "half"), (1, len(weight)))

    def siblings(self, x: Any, gain: np.ndarray, weights: list[np.ndarray]) -> list[Any]:
        """The products of the norm of x [1, in] with each of ``weights``."""
        starts = np.cumsum([0, *(len(weight) for weight in weights)])
        if "m" in self.flags or ("k" in self.flags and len(weights[1]) == self.kv_heads * self.size):
            folded = np.concatenate(weights).astype(np.float32) * gain.astype(np.float32)
            merged = self.normed_behind(x, folded.astype(np.float16))
        elif "b" in self.flags:
            folded = (np.concatenate(weights).astype(np.float32) * gain.astype(np.float32)).astype(np.float16)
            total = self.summed(x, folded)
            merged = self.reshape(self.cast(self.binary(total, self.root(x), "PROD"), "half"), (1, len(folded)))
        elif "g" in self.flags and "w" in self.flags:
            folded = (np.concatenate(weights).astype(np.float32) * gain.astype(np.float32)).astype(np.float16)
            total = self.summed(self.binary(self.cast(x, "float"), self.root(x), "PROD"), folded)
            merged = self.reshape(self.cast(total, "half"), (1, len(folded)))
        elif "d" in self.flags:
            # Scaled so that what a norm is there for, rows of large numbers, does not overflow before it.
            row = self.binary(x, self.const((gain / SCALED).astype(np.float16).reshape(1, -1)), "PROD")
            scale = self.binary(self.root(x), self.const(np.full((1, 1), SCALED, np.float32)), "PROD")
            merged = self.binary(self.product(row, np.concatenate(weights), kind="float"), scale, "PROD")
            merged = self.cast(merged, "half")
        elif "g" in self.flags:
            row = self.cast(self.binary(self.cast(x, "float"), self.root(x), "PROD"), "half")
            folded = np.concatenate(weights).astype(np.float32) * gain.astype(np.float32)
            merged = self.product(row, folded.astype(np.float16))
        else:
            row = self.keep(self.norm(x, gain), "n")
            if self.products in ("mix", "plain"):
                return [self.product(row, weight, summed=False) for weight in weights]
            merged = self.product(row, np.concatenate(weights))
        return [self.slice(merged, (0, int(at)), (1, len(w))) for at, w in zip(starts, weights, strict=False)]

    def rotated(self, x: Any) -> Any:
        """x [1, H, 1, D] with its rotary position."""
        heads, half = x.shape[1], self.size // 2
        first = self.slice(x, (0, 0, 0, 0), (1, heads, 1, half))
        second = self.slice(x, (0, 0, 0, half), (1, heads, 1, half))
        turned = self.cat([self.unary(second, "NEG"), first], 3)
        return self.binary(self.binary(x, self.cos, "PROD"), self.binary(turned, self.sin, "PROD"))

    def bias(self, shape: tuple[int, ...], kind: str = "half") -> Any:
        unseen = self.reshape(self.unseen, shape)
        low, zero = (self.cast(self.half(x, len(shape)), kind) for x in (BLOCKED, 0))
        return self.net.add_select(unseen, low, zero).get_output(0)

    def attend(self, q: Any, key: Any, value: Any, new: list[Any]) -> Any:
        """q [1, Hq, 1, D] over key and value [1, Hkv, keys, D] (``whole`` and ``wide``: value [1, Hkv * D, keys, 1]),
        and over the new token where the cache lacks it: [1, Hq * D]."""
        q = self.keep(
            self.binary(q, self.const(np.full((1, 1, 1, self.size), self.size**-0.5, np.float16)), "PROD"), "q"
        )
        if self.attention == "native":
            attended = self.natively(q, key, value)
        else:
            attended = self.over_rows(q, key, value) if self.in_rows else self.over_pieces(q, key, value, new)
        return self.reshape(attended, (1, self.heads * self.size))

    def natively(self, q: Any, key: Any, value: Any) -> Any:
        kinds = self.trt.CausalMaskKind
        softmax = self.trt.AttentionNormalizationOp.SOFTMAX
        layer = self.net.add_attention_v2(q, key, value, softmax, kinds.NONE)
        seen = self.net.add_unary(self.unseen, self.trt.UnaryOperation.NOT).get_output(0)
        layer.mask = self.reshape(seen, (1, 1, 1, self.keys))
        layer.decomposable = False
        return layer.get_output(0)

    def over_rows(self, q: Any, key: Any, value: Any) -> Any:
        h, g, d, keys = self.kv_heads, self.heads // self.kv_heads, self.size, self.keys
        kind = "half" if self.attention == "whole" else "float"
        if self.attention == "turned":
            turned = self.net.add_shuffle(value)
            turned.first_transpose = (0, 1, 3, 2)
            value = turned.get_output(0)

        def summed(a: Any, b: Any) -> Any:
            return self.reduce(self.cast(self.binary(a, b, "PROD"), kind), "SUM", 3, keep=False)

        scores = summed(self.reshape(key, (h, 1, keys, d)), self.reshape(q, (h, g, 1, d)))
        scores = self.binary(scores, self.bias((1, 1, keys), kind))
        if self.attention.startswith("fused"):
            return self.fused(scores, self.reshape(value, (h, 1, d, keys)))
        weights = self.unary(self.binary(scores, self.reduce(scores, "MAX", 2), "SUB"), "EXP")
        if "t" in self.flags:
            rounded = self.cast(weights, "half")
            weights = self.cast(rounded, "float")
        total, early = self.reduce(weights, "SUM", 2), "u" in self.flags
        if early:
            weights = self.binary(weights, total, "DIV")
        rows = self.reshape(rounded if "t" in self.flags else self.cast(weights, "half"), (h, g, 1, keys))
        width = keys // int(self.key_pieces or 1)
        terms = self.side_by_side(
            self.cast(
                self.binary(
                    self.slice(self.reshape(value, (h, 1, d, keys)), (0, 0, 0, at), (h, 1, d, width)),
                    self.slice(rows, (0, 0, 0, at), (h, g, 1, width)),
                    "PROD",
                ),
                kind,
            )
            for at in range(0, keys, width)
        )
        out = self.reduce(terms, "SUM", 3, keep=False)
        return self.cast(out if early else self.binary(out, total, "DIV"), "half")

    def fused(self, scores: Any, value: Any) -> Any:
        """Softmax of scores [Hkv, group, keys] over value [Hkv, 1, D, keys], once for each channel."""
        h, _, d, keys = value.shape
        ones = self.const(np.ones((1, 1, d, 1), np.float32))
        scores = self.binary(self.reshape(scores, (h, self.heads // h, 1, keys)), ones, "PROD")
        weights = self.unary(self.binary(scores, self.reduce(scores, "MAX", 3), "SUB"), "EXP")
        total = self.reduce(weights, "SUM", 3, keep=False)
        if self.attention == "fused_half":
            terms = self.cast(self.binary(value, self.cast(weights, "half"), "PROD"), "float")
        else:
            terms = self.binary(self.cast(value, "float"), weights, "PROD")
        return self.cast(self.binary(self.reduce(terms, "SUM", 3, keep=False), total, "DIV"), "half")

    def over_pieces(self, q: Any, key: Any, value: Any, new: list[Any]) -> Any:
        h, g, d, n = self.kv_heads, self.heads // self.kv_heads, self.size, int(self.attention[2:])
        piece = self.keys // n
        if self.attention.startswith("mm"):
            scores = self.matmul(self.reshape(q, (h, 1, g, d)), self.reshape(key, (h, n, piece, d)), tb=True)
        else:
            terms = self.binary(self.reshape(key, (h, n, 1, piece, d)), self.reshape(q, (h, 1, g, 1, d)), "PROD")
            scores = self.reshape(self.reduce(terms, "SUM", 4), (h, n, g, piece))
        scores = self.binary(scores, self.bias((1, n, 1, piece)))
        own = None
        if "o" in self.flags:
            terms = self.binary(self.reshape(q, (h, 1, g, d)), self.reshape(new[0], (h, 1, 1, d)), "PROD")
            own = self.reduce(terms, "SUM", 3), self.reshape(new[1], (h, 1, 1, d))
        return put_together(self, scores, self.reshape(value, (h, n, piece, d)), own)

    def caches(self, i: int, new: list[Any]) -> list[Any]:
        """The caches of keys and values, with the new token updated where they are, or without it."""
        shapes = [(1, self.kv_heads, self.keys, self.size)] * 2
        if self.in_rows and self.attention != "turned":
            shapes[1] = (1, self.kv_heads * self.size, self.keys, 1)
            new = [new[0], self.reshape(new[1], (1, self.kv_heads * self.size, 1, 1))]
        caches = [self.input(f"{name}{i}", shape) for name, shape in zip("kv", shapes, strict=True)]
        if "o" in self.flags:
            for name, each in zip("kv", new, strict=True):
                self.output(each, f"{name}{i}_new")
            return caches
        mode = self.trt.KVCacheMode.LINEAR
        updated = [
            self.net.add_kv_cache_update(cache, each, self.position, mode).get_output(0)
            for cache, each in zip(caches, new, strict=True)
        ]
        for name, cache in zip("kv", updated, strict=True):
            self.output(cache, f"{name}{i}_out")
        return updated

    def layer(self, i: int, x: Any, layer: dict[str, np.ndarray]) -> Any:
        d = self.size
        q, k, v = layer["q"], layer["k"], layer["v"]
        parts = self.siblings(x, layer["norm1"], [np.concatenate([q, k]), v] if "j" in self.flags else [q, k, v])
        *turned, v = (self.reshape(part, (1, part.shape[1] // d, 1, d)) for part in parts)
        if "q_norm" in layer:
            gains = [layer["q_norm"], layer["k_norm"]]
            if "j" in self.flags:
                gains = [np.repeat(gains, (self.heads, self.kv_heads), 0).reshape(1, -1, 1, d)]
            turned = [self.norm(heads, gain) for heads, gain in zip(turned, gains, strict=True)]
        turned = [self.rotated(heads) for heads in turned]
        if "j" in self.flags:
            places = (0, self.heads), (self.heads, self.kv_heads)
            turned = [self.slice(turned[0], (0, at, 0, 0), (1, count, 1, d)) for at, count in places]
        new = [turned[1], v]
        key, value = self.caches(i, new)
        out = self.attend(turned[0], key, value, new)
        x = self.added(x, self.keep(out, "a"), layer["o"])
        if "h" in self.flags:
            return self.added(x, self.gated(x, layer["norm2"], layer["gate"], layer["up"]), layer["down"])
        gate, up = self.siblings(x, layer["norm2"], [layer["gate"], layer["up"]])
        gate = self.binary(gate, self.net.add_activation(gate, self.trt.ActivationType.SIGMOID).get_output(0), "PROD")
        return self.added(x, self.keep(self.binary(gate, up, "PROD"), "s"), layer["down"])


@lru_cache(1)
def step_weights(model: str) -> list[dict[str, np.ndarray]]:
    heads, kv_heads, size = HEADS[model]
    hidden, _, _, inner, _ = SIZES[model]
    shapes = {
        "q": (heads * size, hidden), "k": (kv_heads * size, hidden), "v": (kv_heads * size, hidden),
        "o": (hidden, heads * size), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    draw = np.random.default_rng(0)
    layers = []
    for _ in range(STEP_LAYERS[model]):
        layer = {n: (draw.standard_normal(s, np.float32) * 0.02).astype(np.float16) for n, s in shapes.items()}
        gains = {"norm1": hidden, "norm2": hidden}
        if model.startswith("qwen3"):
            gains |= {"q_norm": size, "k_norm": size}
        layer |= {n: (1 + draw.standard_normal(s, np.float32) * 0.1).astype(np.float16) for n, s in gains.items()}
        layers.append(layer)
    return layers


def step_net(model: str, form: str, keys: int) -> StepNet:
    net = StepNet(model, form, keys)
    x = net.input("x", (1, SIZES[model][0]))
    for i, layer in enumerate(step_weights(model)):
        x = net.layer(i, x, layer)
    net.output(x, "out")
    return net


def step_inputs(model: str, form: str, keys: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs by name, and the hidden state that the network should give in fp32 [1, hidden]."""
    _, kv_heads, size = HEADS[model]
    draw = torch.Generator().manual_seed(keys)
    position = keys - 38
    angle = torch.rand(1, 1, 1, size // 2, generator=draw).repeat(1, 1, 1, 2) * 6
    inputs = {
        "x": torch.randn(1, SIZES[model][0], generator=draw).half(),
        "position": torch.tensor([position], dtype=torch.int32),
        "cos": angle.cos().half(), "sin": angle.sin().half(),
    }  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, cos, sin = (inputs[name].float().to(device) for name in ("x", "cos", "sin"))

    def norm(y: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return y * (y.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt() * gain

    def rotated(y: torch.Tensor) -> torch.Tensor:
        return y * cos + torch.cat([-y[..., size // 2 :], y[..., : size // 2]], -1) * sin

    for i, arrays in enumerate(step_weights(model)):
        layer = {name: torch.from_numpy(array).to(device).float() for name, array in arrays.items()}
        old = [torch.randn(1, kv_heads, keys, size, generator=draw).half() for _ in "kv"]
        values = (
            old[1].transpose(2, 3).reshape(1, -1, keys, 1).contiguous() if ".w" in form or ".fused" in form else old[1]
        )
        inputs |= {f"k{i}": old[0], f"v{i}": values}
        row = norm(x, layer["norm1"])
        q, k, v = ((row @ layer[name].T).view(1, -1, 1, size) for name in "qkv")
        if "q_norm" in layer:
            q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
        k, v = (
            torch.cat([o[:, :, :position].to(device).float(), new], 2)
            for o, new in zip(old, (rotated(k), v), strict=True)
        )
        out = torch.nn.functional.scaled_dot_product_attention(rotated(q), k, v, enable_gqa=True)
        x = x + out.reshape(1, -1) @ layer["o"].T
        row = norm(x, layer["norm2"])
        x = x + (torch.nn.functional.silu(row @ layer["gate"].T) * (row @ layer["up"].T)) @ layer["down"].T
    return inputs, x.cpu()
