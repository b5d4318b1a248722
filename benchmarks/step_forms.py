"""Whole decoder layers at one token, each part in one of several forms, as networks for :mod:`benchmarks.kernels`.

A form is four words with dots between them, ``PRODUCTS.NORM.ATTENTION.CACHE``:

*products*: ``mix`` multiplies siblings (query, key and value; gate and up) as matrix products and the others element by
element, with sums; ``merge_mm`` and ``merge_sum`` put siblings' weights together into one product, as a matrix product or
element by element; ``sum`` is element by element without putting together.
*norm*: ``hf`` as Hugging Face writes it; ``defer`` multiplies by the reciprocal root behind the product, in fp32;
``inside`` sums up the squares in the product's own loop as well.
*attention*: ``mm8`` pieces by matrix products, ``sum8`` element by element, ``ms8`` scores element by element and
values as matrix products.
*cache*: ``updated`` reads what the cache update gives; ``old`` reads the cache before the update and adds the new
token by itself; ``out`` does the same, and leaves the update to somebody else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from benchmarks.kernel_forms import BLOCKED, HEADS, SIZES, Net

STEP_LAYERS = {"llama3_1b": 4, "qwen2_5_0_5b": 8, "qwen3_0_6b": 8}
STEP = (
    "mix.hf.mm16.updated",
    "merge_mm.hf.mm16.updated",
    "merge_sum.hf.mm16.updated",
    "sum.hf.mm16.updated",
    "merge_sum.defer.mm16.updated",
    "merge_sum.inside.mm16.updated",
    "mix.hf.sum16.updated",
    "mix.hf.ms16.updated",
    "mix.hf.mm16.old",
    "mix.hf.sum16.old",
    "mix.hf.ms16.old",
    "mix.hf.mm16.out",
    "mix.hf.sum16.out",
    "merge_sum.defer.sum16.old",
    "merge_sum.inside.sum16.old",
    "merge_sum.inside.sum16.out",
    "merge_sum.inside.sum32.out",
)
EPSILON = 1e-5


class StepNet(Net):
    """The layers of a decoder, from the hidden state of one token to that of the last layer."""

    def __init__(self, model: str, form: str, keys: int) -> None:
        super().__init__()
        self.products, self.norm_form, attention, self.cache = form.split(".")
        self.attention_form, self.count = (
            attention.rstrip("0123456789"),
            int(attention.lstrip("abcdefghijklmnopqrstuvwxyz")),
        )
        self.model, self.keys = model, keys
        self.heads, self.kv_heads, self.size = HEADS[model]
        self.hidden, _, self.out, self.inner, _ = SIZES[model]
        self.position = self.input("position", (1,), "int")
        self.cos, self.sin = (self.input(name, (1, 1, 1, self.size)) for name in ("cos", "sin"))
        places = self.const(np.arange(keys, dtype=np.int32).reshape(1, keys))
        limit = "LESS" if self.cache == "updated" else "SUB"
        unseen = self.binary(places, self.reshape(self.position, (1, 1)), "GREATER")
        if limit == "SUB":  # the new token's own place is not read from the cache
            equal = self.binary(places, self.reshape(self.position, (1, 1)), "EQUAL")
            unseen = self.binary(unseen, equal, "OR")
        self.unseen = self.reshape(unseen, (1, self.count, 1, keys // self.count))

    # -- small pieces ---------------------------------------------------------------------------------------------

    def half(self, value: float, rank: int) -> Any:
        return self.const(np.full((1,) * rank, value, np.float16))

    def cast(self, x: Any, kind: str) -> Any:
        return self.net.add_cast(x, {"half": self.trt.float16, "float": self.trt.float32}[kind]).get_output(0)

    def unary(self, x: Any, op: str) -> Any:
        return self.net.add_unary(x, getattr(self.trt.UnaryOperation, op)).get_output(0)

    def root(self, mean: Any) -> Any:
        """1 / sqrt(mean + epsilon), fp32."""
        epsilon = self.const(np.full((1,) * len(mean.shape), EPSILON, np.float32))
        return self.unary(self.unary(self.binary(mean, epsilon), "SQRT"), "RECIP")

    def mean_square(self, x: Any) -> Any:
        wide = self.cast(x, "float")
        return self.reduce(self.binary(wide, wide, "PROD"), "AVG", len(x.shape) - 1)

    def norm(self, x: Any, gain: np.ndarray) -> Any:
        wide = self.binary(self.cast(x, "float"), self.root(self.mean_square(x)), "PROD")
        return self.binary(self.cast(wide, "half"), self.const(gain.reshape((1,) * (len(x.shape) - 1) + (-1,))), "PROD")

    def product(self, x: Any, weight: np.ndarray, summed: bool) -> Any:
        """x [1, in] times weight [out, in] transposed: [1, out]."""
        out = weight.shape[0]
        if not summed:
            return self.matmul(x, self.const(weight), tb=True)
        return self.reshape(self.reduce(self.binary(self.const(weight), x, "PROD"), "SUM", 1, keep=False), (1, out))

    def normed_products(self, x: Any, gain: np.ndarray, weights: list[np.ndarray]) -> list[Any]:
        """The products of norm(x) with each of ``weights``."""
        merged = self.products.startswith("merge")
        summed = self.products in ("merge_sum", "sum")
        groups = [np.concatenate(weights)] if merged else weights
        if self.norm_form == "hf":
            row = self.norm(x, gain)
            outs = [self.product(row, weight, summed) for weight in groups]
        else:
            row = self.cast(self.binary(x, self.const(gain.reshape(1, -1)), "PROD"), "float")
            wide = self.cast(x, "float")
            outs = []
            for weight in groups:
                terms = self.binary(self.cast(self.const(weight), "float"), row, "PROD")
                total = self.reduce(terms, "SUM", 1)
                if self.norm_form == "inside":
                    shares = self.const(np.full((len(weight), 1), 1 / self.hidden, np.float32))
                    mean = self.reduce(self.binary(self.binary(wide, wide, "PROD"), shares, "PROD"), "SUM", 1)
                else:
                    mean = self.mean_square(x)
                total = self.cast(self.binary(total, self.root(mean), "PROD"), "half")
                outs.append(self.reshape(total, (1, len(weight))))
        if not merged:
            return outs
        starts = np.cumsum([0] + [len(weight) for weight in weights])
        return [self.slice(outs[0], (0, int(at)), (1, len(w))) for at, w in zip(starts, weights, strict=False)]

    def rotated(self, x: Any) -> Any:
        """x [1, H, 1, D] with its rotary position."""
        heads, half = x.shape[1], self.size // 2
        first = self.slice(x, (0, 0, 0, 0), (1, heads, 1, half))
        second = self.slice(x, (0, 0, 0, half), (1, heads, 1, half))
        turned = self.cat([self.unary(second, "NEG"), first], 3)
        return self.binary(self.binary(x, self.cos, "PROD"), self.binary(turned, self.sin, "PROD"))

    # -- attention ------------------------------------------------------------------------------------------------

    def attend(self, q: Any, cached: tuple[Any, Any], new: tuple[Any, Any]) -> Any:
        """q [1, Hq, 1, D] over the cache, and over the new token where the cache lacks it: [1, Hq * D]."""
        h, g, n, d = self.kv_heads, self.heads // self.kv_heads, self.count, self.size
        piece = self.keys // n
        q = self.binary(q, self.const(np.full((1, 1, 1, d), d**-0.5, np.float16)), "PROD")
        bias = self.net.add_select(self.unseen, self.half(BLOCKED, 4), self.half(0, 4)).get_output(
            0
        )  # [1, n, 1, piece]
        key, value = cached
        if self.attention_form == "mm":
            key = self.reshape(key, (h, n, piece, d))
            scores = self.matmul(self.reshape(q, (h, 1, g, d)), key, tb=True)
        else:
            key = self.reshape(key, (h, n, 1, piece, d))
            terms = self.binary(key, self.reshape(q, (h, 1, g, 1, d)), "PROD")
            scores = self.reshape(self.reduce(terms, "SUM", 4), (h, n, g, piece))
        scores = self.binary(scores, bias)
        most = self.reduce(scores, "MAX", 3)
        weights = self.unary(self.binary(scores, most, "SUB"), "EXP")
        total = self.reduce(weights, "SUM", 3)
        if self.attention_form == "sum":
            value = self.reshape(value, (h, n, 1, piece, d))
            terms = self.binary(value, self.reshape(weights, (h, n, g, piece, 1)), "PROD")
            out = self.reshape(self.reduce(terms, "SUM", 3), (h, n, g, d))
        else:
            out = self.matmul(weights, self.reshape(value, (h, n, piece, d)))
        highest = self.reduce(most, "MAX", 1)
        if self.cache != "updated":
            own = self.reduce(
                self.binary(self.reshape(q, (h, 1, g, d)), self.reshape(new[0], (h, 1, 1, d)), "PROD"), "SUM", 3
            )
            highest = self.binary(highest, own, "MAX")
        share = self.unary(self.binary(most, highest, "SUB"), "EXP")
        total = self.reduce(self.binary(total, share, "PROD"), "SUM", 1)
        out = self.reduce(self.binary(out, share, "PROD"), "SUM", 1)
        if self.cache != "updated":
            own = self.unary(self.binary(own, highest, "SUB"), "EXP")
            total = self.binary(total, own)
            out = self.binary(out, self.binary(own, self.reshape(new[1], (h, 1, 1, d)), "PROD"))
        return self.reshape(self.binary(out, total, "DIV"), (1, self.heads * d))

    def layer(self, i: int, x: Any, layer: dict[str, np.ndarray]) -> Any:
        d = self.size
        q, k, v = self.normed_products(x, layer["norm1"], [layer["q"], layer["k"], layer["v"]])
        q, k, v = (self.reshape(part, (1, part.shape[1] // d, 1, d)) for part in (q, k, v))
        if "q_norm" in layer:
            q, k = self.norm(q, layer["q_norm"]), self.norm(k, layer["k_norm"])
        q, k = self.rotated(q), self.rotated(k)
        caches = [self.input(f"{name}{i}", (1, self.kv_heads, self.keys, d)) for name in "kv"]
        if self.cache == "out":
            for name, new in zip("kv", (k, v), strict=True):
                self.output(new, f"{name}{i}_new")
        else:
            mode = self.trt.KVCacheMode.LINEAR
            updated = [
                self.net.add_kv_cache_update(cache, new, self.position, mode).get_output(0)
                for cache, new in zip(caches, (k, v), strict=True)
            ]
            for name, cache in zip("kv", updated, strict=True):
                self.output(cache, f"{name}{i}_out")
            if self.cache == "updated":
                caches = updated
        out = self.attend(q, (caches[0], caches[1]), (k, v))
        lone_summed = self.products != "merge_mm"
        x = self.binary(x, self.product(out, layer["o"], lone_summed))
        gate, up = self.normed_products(x, layer["norm2"], [layer["gate"], layer["up"]])
        gate = self.binary(gate, self.net.add_activation(gate, self.trt.ActivationType.SIGMOID).get_output(0), "PROD")
        return self.binary(x, self.product(self.binary(gate, up, "PROD"), layer["down"], lone_summed))


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
    heads, kv_heads, size = HEADS[model]
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
        keys_before, values_before = (torch.randn(1, kv_heads, keys, size, generator=draw).half() for _ in "kv")
        inputs |= {f"k{i}": keys_before, f"v{i}": values_before}
        row = norm(x, layer["norm1"])
        q, k, v = ((row @ layer[name].T).view(1, -1, 1, size) for name in "qkv")
        if "q_norm" in layer:
            q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
        q, k = rotated(q), rotated(k)
        seen_keys = torch.cat([keys_before[:, :, :position].to(device).float(), k], 2)
        seen_values = torch.cat([values_before[:, :, :position].to(device).float(), v], 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, seen_keys, seen_values, enable_gqa=True)
        x = x + out.reshape(1, -1) @ layer["o"].T
        row = norm(x, layer["norm2"])
        x = x + (torch.nn.functional.silu(row @ layer["gate"].T) * (row @ layer["up"].T)) @ layer["down"].T
    return inputs, x.cpu()
