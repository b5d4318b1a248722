"""A TensorRT network, layer by layer, in PyTorch: what its layers say is computed, where no GPU could run its engine.

It knows the layers that local attention is made of, and reads everything from the network itself: what TensorRT's
documentation says that a layer does with its inputs and attributes is done with tensors of PyTorch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from passes.tensorrt.versions import load_stack

ELEMENTWISE = {
    "SUM": operator.add, "SUB": operator.sub, "PROD": operator.mul, "MIN": torch.minimum, "MAX": torch.maximum,
    "FLOOR_DIV": operator.floordiv, "AND": operator.and_, "GREATER": operator.gt,
}  # fmt: skip
CLASSES = {
    "CONSTANT": "IConstantLayer", "SHAPE": "IShapeLayer", "SLICE": "ISliceLayer", "SHUFFLE": "IShuffleLayer",
    "CONCATENATION": "IConcatenationLayer", "ELEMENTWISE": "IElementWiseLayer", "CAST": "ICastLayer",
}  # fmt: skip


def run(network: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of ``network`` for its ``inputs``; raises :class:`KeyError` for a layer that is not known here."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    maker = {layer.get_output(0).name: layer for layer in layers}
    known = {network.get_input(i).name: tensor for i, tensor in enumerate(inputs)}

    def value(tensor: Any) -> Tensor | None:  # layers do not stand in the order in which they run
        if tensor is None:
            return None
        if tensor.name not in known:
            known[tensor.name] = made = _run(layer := maker[tensor.name], _inputs(layer, value))
            sizes = zip(made.shape, tensor.shape, strict=True)
            assert all(have == said for have, said in sizes if said >= 0), (layer.name, made.shape, tensor.shape)
        return known[tensor.name]

    return [value(network.get_output(i)) for i in range(network.num_outputs)]  # type: ignore[misc]


def _inputs(layer: Any, value: Callable[[Any], Tensor | None]) -> list[Any]:
    return [value(layer.get_input(i)) for i in range(layer.num_inputs)]


def _run(layer: Any, values: list[Any]) -> Tensor:
    kind = layer.type.name
    if kind in CLASSES:
        layer.__class__ = getattr(load_stack().trt, CLASSES[kind])
    return LAYERS[kind](layer, values)


def _attention(layer: Any, values: list[Any]) -> Tensor:
    """Without a scale, as the layer does it; which kind it is can no longer be read from it but in its name."""
    query, key, value, *rest = values
    causal, mask = "[causal]" in layer.name, rest[0] if rest else None
    assert causal is (mask is None) and (mask is None or mask.shape[2:] == (query.shape[2], key.shape[2]))
    assert mask is None or bool(mask.any(-1).all()), "a row sees no key: TensorRT gives anything there"
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=1.0, enable_gqa=True
    )


def _constant(layer: Any, values: list[Any]) -> Tensor:
    return torch.from_numpy(layer.weights.copy() if hasattr(layer.weights, "copy") else layer.weights.numpy()).reshape(
        tuple(layer.shape)
    )


def _slice(layer: Any, values: list[Any]) -> Tensor:
    x = values[0]
    start, sizes = (
        [int(n) for n in values[at]] if len(values) > at and values[at] is not None else list(said)
        for at, said in ((1, layer.start), (2, layer.shape))
    )
    assert set(layer.stride) == {1}
    for axis, (first, size) in enumerate(zip(start, sizes, strict=True)):
        have = x.shape[axis]
        inside = first >= 0 and first + size <= have
        assert inside or layer.mode == load_stack().trt.SampleMode.FILL, f"{layer.name}: {first} + {size} of {have}"
        before = min(max(-first, 0), size)
        begin = min(max(first, 0), have)
        piece = x.narrow(axis, begin, max(min(size - before, have - begin), 0))
        missing = [list(piece.shape) for _ in range(2)]
        missing[0][axis], missing[1][axis] = before, size - before - piece.shape[axis]
        x = torch.cat([piece.new_zeros(missing[0]), piece, piece.new_zeros(missing[1])], axis)
    return x


def _shuffle(layer: Any, values: list[Any]) -> Tensor:
    x = values[0].permute(*list(layer.first_transpose)[: values[0].dim()])
    sizes = [int(n) for n in values[1]] if len(values) > 1 else list(layer.reshape_dims)
    sizes = [x.shape[i] if size == 0 and len(values) == 1 else size for i, size in enumerate(sizes)]
    assert -1 in sizes or math.prod(sizes) == x.numel()
    x = x.reshape(sizes)
    return x.permute(*list(layer.second_transpose)[: x.dim()])


LAYERS: dict[str, Any] = {
    "ATTENTION_INPUT": _attention,
    "ATTENTION_OUTPUT": lambda layer, values: values[0],
    "CONSTANT": _constant,
    "SHAPE": lambda layer, values: torch.tensor(values[0].shape),
    "SLICE": _slice,
    "SHUFFLE": _shuffle,
    "CONCATENATION": lambda layer, values: torch.cat(values, layer.axis),
    "ELEMENTWISE": lambda layer, values: ELEMENTWISE[layer.op.name](*values),
    "CAST": lambda layer, values: values[0].to(getattr(torch, layer.to_type.name.lower(), torch.float32)),
}
