"""Whole decoder layers at one token, each part in one of several forms, as networks for :mod:`benchmarks.kernels`.

A form is three words with dots between them, ``PRODUCTS.ATTENTION.FLAGS``:

*products*: ``mix`` multiplies siblings (query, key and value; gate and up) as matrix products and the others element by
element, with sums; ``merged`` puts siblings' weights together into one product, element by element.
*attention*, over so many pieces of the keys: ``mm`` is scores and values by matrix products, each piece with a softmax
of its own; ``ms`` has scores element by element; ``sx`` that, and one softmax over all the keys; ``ss`` that, and
values element by element.
*flags*: what is kept from being computed anew in every block of the product that reads it, by a sum over a new axis
(TensorRT fuses no sum into what follows): ``n`` normed rows, ``s`` the activated row of the gate, ``q`` rotated queries,
``a`` the result of attention; as capitals, by a scatter.  ``o``: the new token is left out of the cache, its attention is
added, and its keys and values are outputs.  ``-`` for none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from benchmarks.kernel_forms import BLOCKED, HEADS, SIZES, Net

STEP_LAYERS = {"llama3_1b": 4, "qwen2_5_0_5b": 8, "qwen3_0_6b": 8}
STEP = (
    "merged.ms16.-",
    "merged.ts1.-",
    "merged.ts1.k",
    "merged.ts16.-",
    "merged.ts16.k",
    "merged.ts8.k",
    "merged.ms16.k",
    "merged.sz16.-",
    "merged.tn1.-",
    "merged.tn1.k",
)
EPSILON = 1e-5


class StepNet(Net):
    """The layers of a decoder, from the hidden state of one token to that of the last layer."""

    def __init__(self, model: str, form: str, keys: int) -> None:
        super().__init__()
        self.products, attention, self.flags = form.split(".")
        self.attention_form, self.pieces = attention[:2], int(attention[2:])
        self.keys, self.made = keys, 0
        self.heads, self.kv_heads, self.size = HEADS[model]
        self.hidden, _, _, self.inner, _ = SIZES[model]
        self.position = self.input("position", (1,), "int")
        self.cos, self.sin = (self.input(name, (1, 1, 1, self.size)) for name in ("cos", "sin"))
        places = self.const(np.arange(keys, dtype=np.int32).reshape(1, keys))
        unseen = self.binary(places, self.reshape(self.position, (1, 1)), "GREATER")
        if "o" in self.flags:
            unseen = self.binary(unseen, self.binary(places, self.reshape(self.position, (1, 1)), "EQUAL"), "OR")
        self.unseen = self.reshape(unseen, (1, self.pieces, 1, keys // self.pieces))

    def half(self, value: float, rank: int) -> Any:
        return self.const(np.full((1,) * rank, value, np.float16))

    def cast(self, x: Any, kind: str) -> Any:
        return self.net.add_cast(x, {"half": self.trt.float16, "float": self.trt.float32}[kind]).get_output(0)

    def unary(self, x: Any, op: str) -> Any:
        return self.net.add_unary(x, getattr(self.trt.UnaryOperation, op)).get_output(0)

    def barrier(self, x: Any, kind: str) -> Any:
        rank = len(x.shape)
        if kind in self.flags:
            wide = self.reshape(x, (*x.shape, 1))
            once = self.const(np.array([1, 0], np.float16).reshape((1,) * rank + (2,)))
            return self.reduce(self.binary(wide, once, "PROD"), "SUM", rank, keep=False)
        if kind.upper() in self.flags:
            count = int(np.prod(x.shape))
            data, index = self.const(np.zeros((1, count), np.float16)), self.const(np.zeros((1, 1), np.int32))
            scattered = self.net.add_scatter(data, index, self.reshape(x, (1, count)), self.trt.ScatterMode.ND)
            return self.reshape(scattered.get_output(0), tuple(x.shape))
        return x

    def norm(self, x: Any, gain: np.ndarray) -> Any:
        wide = self.cast(x, "float")
        mean = self.reduce(self.binary(wide, wide, "PROD"), "AVG", len(x.shape) - 1)
        epsilon = self.const(np.full((1,) * len(mean.shape), EPSILON, np.float32))
        wide = self.binary(wide, self.unary(self.unary(self.binary(mean, epsilon), "SQRT"), "RECIP"), "PROD")
        return self.binary(self.cast(wide, "half"), self.const(gain.reshape((1,) * (len(x.shape) - 1) + (-1,))), "PROD")

    def product(self, x: Any, weight: np.ndarray, summed: bool = True) -> Any:
        """x [1, in] times weight [out, in] transposed: [1, out]."""
        if not summed:
            return self.matmul(x, self.const(weight), tb=True)
        terms = self.binary(self.const(weight), x, "PROD")
        return self.reshape(self.reduce(terms, "SUM", 1, keep=False), (1, weight.shape[0]))

    def siblings(self, row: Any, weights: list[np.ndarray]) -> list[Any]:
        if self.products == "mix":
            return [self.product(row, weight, summed=False) for weight in weights]
        merged = self.product(row, np.concatenate(weights))
        starts = np.cumsum([0, *(len(weight) for weight in weights)])
        return [self.slice(merged, (0, int(at)), (1, len(w))) for at, w in zip(starts, weights, strict=False)]

    def rotated(self, x: Any) -> Any:
        """x [1, H, 1, D] with its rotary position."""
        heads, half = x.shape[1], self.size // 2
        first = self.slice(x, (0, 0, 0, 0), (1, heads, 1, half))
        second = self.slice(x, (0, 0, 0, half), (1, heads, 1, half))
        turned = self.cat([self.unary(second, "NEG"), first], 3)
        return self.binary(self.binary(x, self.cos, "PROD"), self.binary(turned, self.sin, "PROD"))

    def attend(self, q: Any, cached: list[Any], new: list[Any]) -> Any:
        """q [1, Hq, 1, D] over cached keys and values [1, Hkv, keys, D], and over the new token: [1, Hq * D]."""
        h, g, n, d = self.kv_heads, self.heads // self.kv_heads, self.pieces, self.size
        piece = self.keys // n
        q = self.binary(q, self.const(np.full((1, 1, 1, d), d**-0.5, np.float16)), "PROD")
        q = self.barrier(q, "q")
        if "k" in self.flags:
            self.made += 1
            scratch = self.input(f"scratch{self.made}", (1, self.heads, 1, d))
            zero = self.const(np.zeros(1, np.int32))
            q = self.net.add_kv_cache_update(scratch, q, zero, self.trt.KVCacheMode.LINEAR).get_output(0)
            self.output(q, f"scratch{self.made}_out")
        if self.attention_form[0] == "t" or self.attention_form == "sz":
            return self.attend_turned(q, *cached)
        bias = self.net.add_select(self.unseen, self.half(BLOCKED, 4), self.half(0, 4)).get_output(0)
        key, value = cached
        if self.attention_form == "mm":
            scores = self.matmul(self.reshape(q, (h, 1, g, d)), self.reshape(key, (h, n, piece, d)), tb=True)
        else:
            terms = self.binary(self.reshape(key, (h, n, 1, piece, d)), self.reshape(q, (h, 1, g, 1, d)), "PROD")
            scores = self.reshape(self.reduce(terms, "SUM", 4), (h, n, g, piece))
        scores = self.binary(scores, bias)
        own = None
        if "o" in self.flags:
            terms = self.binary(self.reshape(q, (h, 1, g, d)), self.reshape(new[0], (h, 1, 1, d)), "PROD")
            own = self.reduce(terms, "SUM", 3)
        whole = self.attention_form == "sy"
        most = self.reduced(scores, "MAX", (1, 3) if whole else (3,))
        highest = self.reduce(most, "MAX", 1) if not whole else most
        if own is not None:
            highest = self.binary(highest, own, "MAX")
        weights = self.unary(self.binary(scores, highest if whole else most, "SUB"), "EXP")
        total = self.reduced(weights, "SUM", (1, 3) if whole else (3,))
        out = self.matmul(weights, self.reshape(value, (h, n, piece, d)))
        if not whole:
            share = self.unary(self.binary(most, highest, "SUB"), "EXP")
            total = self.reduce(self.binary(total, share, "PROD"), "SUM", 1)
            out = self.binary(out, share, "PROD")
        out = self.reduce(out, "SUM", 1)
        if own is not None:
            own = self.unary(self.binary(own, highest, "SUB"), "EXP")
            total = self.binary(total, own)
            out = self.binary(out, self.binary(own, self.reshape(new[1], (h, 1, 1, d)), "PROD"))
        return self.reshape(self.binary(out, total, "DIV"), (1, self.heads * d))

    def attend_turned(self, q: Any, key: Any, value: Any) -> Any:
        h, g, n, d = self.kv_heads, self.heads // self.kv_heads, self.pieces, self.size
        S = self.keys
        bias = self.net.add_select(self.unseen, self.half(BLOCKED, 4), self.half(0, 4)).get_output(0)
        bias = self.reshape(bias, (1, 1, S))
        terms = self.binary(self.reshape(key, (h, 1, S, d)), self.reshape(q, (h, g, 1, d)), "PROD")
        scores = self.binary(self.reduce(terms, "SUM", 3, keep=False), bias)  # h, g, S
        if self.attention_form == "sz":
            weights = self.unary(self.binary(scores, self.reduce(scores, "MAX", 2), "SUB"), "EXP")
            total = self.reduce(weights, "SUM", 2)
            turn = self.net.add_shuffle(self.reshape(weights, (h, g, n, S // n)))
            turn.second_transpose = (0, 2, 1, 3)
            out = self.matmul(turn.get_output(0), self.reshape(value, (h, n, S // n, d)))
            out = self.reduce(out, "SUM", 1, keep=False)
            return self.reshape(self.binary(out, total, "DIV"), (1, self.heads * d))
        if self.attention_form == "tn":  # normalised first
            softmax = self.net.add_softmax(scores)
            softmax.axes = 1 << 2
            weights, total = softmax.get_output(0), None
        elif n == 1:
            weights = self.unary(self.binary(scores, self.reduce(scores, "MAX", 2), "SUB"), "EXP")
            total = self.reduce(weights, "SUM", 2)
        else:  # largest scores of the pieces, then of all
            scores = self.reshape(scores, (h, g, n, S // n))
            most = self.reduce(scores, "MAX", 3)
            highest = self.reduce(most, "MAX", 2)
            weights = self.unary(self.binary(scores, highest, "SUB"), "EXP")
            total = self.reshape(self.reduced(weights, "SUM", (2, 3)), (h, g, 1))
            weights = self.reshape(weights, (h, g, S))
        terms = self.binary(self.reshape(weights, (h, g, 1, S)), self.reshape(value, (h, 1, d, S)), "PROD")
        out = self.reduce(terms, "SUM", 3, keep=False)  # h, g, d
        if total is not None:
            out = self.binary(out, total, "DIV")
        return self.reshape(out, (1, self.heads * d))

    def reduced(self, x: Any, op: str, axes: tuple[int, ...]) -> Any:
        return self.net.add_reduce(
            x, getattr(self.trt.ReduceOperation, op), sum(1 << a for a in axes), True
        ).get_output(0)

    def caches(self, i: int, new: list[Any]) -> list[Any]:
        """The caches of keys and values, with the new token updated where they are, or without it."""
        shape, mode = (1, self.kv_heads, self.keys, self.size), self.trt.KVCacheMode.LINEAR
        caches = [self.input(f"{name}{i}", shape) for name in "kv"] if self.attention_form[0] != "t" else [
            self.input(f"k{i}", shape), self.input(f"v{i}", (1, self.kv_heads * self.size, self.keys, 1))]
        if self.attention_form[0] == "t":
            new = [new[0], self.reshape(new[1], (1, self.kv_heads * self.size, 1, 1))]
        if "o" in self.flags:
            for name, each in zip("kv", new, strict=True):
                self.output(each, f"{name}{i}_new")
            return caches
        updated = [
            self.net.add_kv_cache_update(cache, each, self.position, mode).get_output(0)
            for cache, each in zip(caches, new, strict=True)
        ]
        for name, cache in zip("kv", updated, strict=True):
            self.output(cache, f"{name}{i}_out")
        return updated

    def layer(self, i: int, x: Any, layer: dict[str, np.ndarray]) -> Any:
        d = self.size
        row = self.barrier(self.norm(x, layer["norm1"]), "n")
        parts = self.siblings(row, [layer["q"], layer["k"], layer["v"]])
        q, k, v = (self.reshape(part, (1, part.shape[1] // d, 1, d)) for part in parts)
        if "q_norm" in layer:
            q, k = self.norm(q, layer["q_norm"]), self.norm(k, layer["k_norm"])
        new = [self.rotated(k), v]
        out = self.attend(self.rotated(q), self.caches(i, new), new)
        x = self.binary(x, self.product(self.barrier(out, "a"), layer["o"]))
        row = self.barrier(self.norm(x, layer["norm2"]), "n")
        gate, up = self.siblings(row, [layer["gate"], layer["up"]])
        gate = self.binary(gate, self.net.add_activation(gate, self.trt.ActivationType.SIGMOID).get_output(0), "PROD")
        return self.binary(x, self.product(self.barrier(self.binary(gate, up, "PROD"), "s"), layer["down"]))


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
    x = net.input("x", (1, net.hidden))
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
        turned = old[1].transpose(2, 3).reshape(1, -1, keys, 1).contiguous() if ".t" in form else old[1]
        inputs |= {f"k{i}": old[0], f"v{i}": turned}
        if "k" in form.split(".")[2]:
            inputs[f"scratch{i + 1}"] = torch.zeros(1, HEADS[model][0], 1, size).half()
        row = norm(x, layer["norm1"])
        q, k, v = ((row @ layer[name].T).view(1, -1, 1, size) for name in "qkv")
        if "q_norm" in layer:
            q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
        seen = [
            torch.cat([o[:, :, :position].to(device).float(), new], 2)
            for o, new in zip(old, (rotated(k), v), strict=True)
        ]
        out = torch.nn.functional.scaled_dot_product_attention(rotated(q), *seen, enable_gqa=True)
        x = x + out.reshape(1, -1) @ layer["o"].T
        row = norm(x, layer["norm2"])
        x = x + (torch.nn.functional.silu(row @ layer["gate"].T) * (row @ layer["up"].T)) @ layer["down"].T
    return inputs, x.cpu()
