"""Puts TensorRT's native attention layer (:mod:`passes.tensorrt.fused_kernels`) in the place of an attention call.

What is known about the layer, and how it is dealt with here:

* ``CausalMaskKind.UPPER_LEFT`` is torch's ``is_causal``, for which upstream's converter of Torch-TensorRT 2.14 writes
  LOWER_RIGHT.
* A causal layer takes no mask, and drops one that is assigned without a word: what was set is read back.
* The mask is rank 4, bool or of the query's type, full in its last two dimensions, and no view (:func:`_written_out`).
* A row whose mask blocks every key gives anything; PyTorch gives 0, so that is put there (:func:`_without_unseeing`).
* The layer needs static head counts; reshapes with -1 in the traced graph hide them.
* Query, key and value must have the same head size.  Where the values' differs (DeepSeek), the smaller ones are filled
  up with zeros, which add nothing to a score, and the result's channels that come of zeros are cut off again.
* It does not scale: the softmax scale is multiplied onto the query in front of it (:func:`scaled`).
* It is asked to be one fused kernel wherever TensorRT has one (:class:`passes.tensorrt.fused_kernels.FusedKernels`),
  and then the build finds it or fails; elsewhere TensorRT may decompose it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes.errors import RunError
from passes.graph import ops
from passes.proof.calls import FORMS
from passes.tensorrt.fused_kernels import Asked, FusedKernels, add_layer, causal_kinds, of_this_process
from passes.tensorrt.versions import Stack

CONVERTED = (torch.ops.aten.scaled_dot_product_attention.default, ops.NATIVE)
"""What the pipeline's graphs hold."""


@dataclass(frozen=True)
class NativeLayer:
    """What one native layer was set to, as read back from it."""

    name: str
    causal: str
    masked: bool
    fused: bool
    """Whether the build must find a fused kernel (it fails otherwise)."""
    form: Asked
    why_unfused: str | None
    """TensorRT's words, where it has no fused kernel for the form."""


def convert(
    stack: Stack,
    ctx: Any,
    node: Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kernels: FusedKernels | None = None,
) -> tuple[Any, NativeLayer]:
    """Add the native layer for ``node`` to the network of Torch-TensorRT's conversion context ``ctx``.

    Returns the layer's output tensor [B, Hq, L, Dv] and what the layer was set to.
    ``args`` and ``kwargs`` are those of ``node`` with tensors in the place of nodes: query [B, Hq, L, D],
    key [B, Hkv, S, D], value [B, Hkv, S, D], mask broadcastable over [B, H] or None.  ``kernels``: what there are fused
    kernels for; None: what this process knows of it.
    """
    network = ctx.net
    mask, causal, scale = asked(node, args, kwargs)
    if causal != "none":
        mask = None  # proved to say the same
    query, key, value = (static_heads(network, tensor, node.args[i]) for i, tensor in enumerate(args[:3]))
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    scale = shape[-1] ** -0.5 if scale is None else scale
    if scale != 1.0:
        query = scaled(stack, ctx, query, scale, node)
    channels = value.shape[3]
    size = max(shape[-1], channels)
    query, key, value = (with_channels(stack, network, tensor, size) for tensor in (query, key, value))
    if mask is not None:
        mask = _normalised_mask(stack, ctx, as_tensor(ctx, mask, f"{node.name} [mask]"), query, key, node)
        mask = _written_out(stack, ctx, mask, node)
    traced = (shape, node.args[1].meta["val"].shape)  # type: ignore[union-attr]
    output, built = native_layer(stack, ctx, node.name, (query, key, value), causal, mask, traced, kernels)
    output = with_channels(stack, network, output, channels)
    if mask is not None and node.target is not ops.NATIVE:  # ours is followed by an op that says so where it may be
        output = _without_unseeing(stack, ctx, output, mask, node)
    return output, built


def native_layer(
    stack: Stack,
    ctx: Any,
    name: str,
    qkv: tuple[Any, Any, Any],
    causal: str,
    mask: Any,
    traced: tuple[Any, Any],
    kernels: FusedKernels | None = None,
) -> tuple[Any, NativeLayer]:
    """The layer itself, for tensors that are as it wants them: its output [B, Hq, L, D] and what it was set to.

    ``qkv``: query [B, Hq, L, D], key and value [B, Hkv, S, D], scaled; ``mask`` [B or 1, Hq or 1, L, S] or None;
    ``traced``: the sizes of query and key, see :meth:`passes.tensorrt.fused_kernels.Asked.of`.
    """
    query, key, _ = qkv
    layer = add_layer(stack, ctx.net, qkv, causal)
    if layer is None:
        raise RunError("conversion", f"{name}: TensorRT refused the native attention layer")
    layer.name = f"{name} [{'causal' if causal != 'none' else 'masked' if mask is not None else 'full'}]"
    if mask is not None:
        layer.mask = mask
    form = Asked.of(stack, query, key, causal, mask, traced)
    why_unfused = (kernels or of_this_process()).why_not(stack, ctx.compilation_settings, form)
    layer.decomposable = why_unfused is not None
    built = NativeLayer(
        name=name,
        causal={kind: name for name, kind in causal_kinds(stack.trt).items()}[layer.causal_kind],
        masked=layer.mask is not None,
        fused=not layer.decomposable,
        form=form,
        why_unfused=why_unfused,
    )
    if (built.causal, built.masked) != (causal, mask is not None):
        raise RunError("conversion", f"{name}: asked for causal={causal}, mask={mask is not None}; got {built}")
    return layer.get_output(0), built


def asked(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str, float | None]:
    """The mask, the causal kind and the scale of an op of ours or one of :data:`passes.proof.calls.FORMS`."""
    if node.target is ops.NATIVE:
        return args[3], args[4], args[5]
    mask_at, causal_at = FORMS[node.target]
    mask = args[mask_at] if mask_at is not None and len(args) > mask_at else None
    if mask is None:
        mask = kwargs.get("attn_mask", kwargs.get("attn_bias"))
    causal = args[causal_at] if causal_at is not None and len(args) > causal_at else kwargs.get("is_causal", False)
    return mask, "upper_left" if causal else "none", kwargs.get("scale")


def _without_unseeing(stack: Stack, ctx: Any, output: Any, mask: Any, node: Node) -> Any:
    """``output`` [B, H, L, Dv] with 0 in the rows that see no key by ``mask`` [B or 1, H or 1, L, S]."""
    trt, net = stack.trt, ctx.net
    numbers = net.add_cast(mask, output.dtype).get_output(0) if mask.dtype == trt.bool else mask
    most = net.add_reduce(numbers, trt.ReduceOperation.MAX, 1 << 3, True).get_output(0)
    # -inf alone blocks, as in PyTorch; nothing is compared with it, since the least number is as good a bound.
    least = 0.5 if mask.dtype == trt.bool else torch.finfo(node.args[0].meta["val"].dtype).min  # type: ignore[union-attr]
    bound, zero = (
        net.add_cast(
            as_tensor(ctx, torch.full((1, 1, 1, 1), number), f"{node.name} [{name}]"), output.dtype
        ).get_output(0)
        for name, number in (("least", least), ("zero", 0.0))
    )
    unseeing = net.add_elementwise(most, bound, trt.ElementWiseOperation.LESS).get_output(0)
    layer = net.add_select(unseeing, zero, output)
    layer.name = f"{node.name} [rows that see no key]"
    return layer.get_output(0)


def static_heads(network: Any, tensor: Any, node: Any) -> Any:
    """``tensor`` with the head count and head size that the traced graph knows; other sizes are copied."""
    traced = node.meta["val"].shape
    wanted = tuple(extent if isinstance(extent, int) else 0 for extent in traced)
    if all(extent in (0, have) for extent, have in zip(wanted, tuple(tensor.shape), strict=True)):
        return tensor
    layer = network.add_shuffle(tensor)
    layer.reshape_dims = wanted  # 0 copies the size of the input
    layer.name = f"{node.name} [static heads]"
    return layer.get_output(0)


def with_channels(stack: Stack, network: Any, tensor: Any, count: int) -> Any:
    """``tensor`` [B, H, L, D] with ``count`` channels in the place of D: the first ones, or filled up with zeros."""
    heads, have = tensor.shape[1], tensor.shape[3]
    if have == count:
        return tensor
    sizes = network.add_slice(network.add_shape(tensor).get_output(0), (0,), (3,), (1,)).get_output(0)
    last = network.add_constant((1,), stack.trt.Weights(torch.tensor([count]).numpy())).get_output(0)
    layer = network.add_slice(tensor, (0,) * 4, (1,) * 4, (1,) * 4)
    layer.set_input(2, network.add_concatenation([sizes, last]).get_output(0))
    layer.mode = stack.trt.SampleMode.FILL
    return reshaped(network, layer.get_output(0), (0, heads, 0, count))  # static again; 0 copies the size of the input


def _normalised_mask(stack: Stack, ctx: Any, mask: Any, query: Any, key: Any, node: Node) -> Any:
    """``mask`` with four dimensions, the last two at the full L and S, bool or of the query's type."""
    from torch_tensorrt.dynamo.conversion.converter_utils import prepend_ones

    network = ctx.net
    if mask.dtype not in (stack.trt.bool, query.dtype):
        mask = network.add_cast(mask, query.dtype).get_output(0)
    missing = 4 - len(mask.shape)
    if missing > 0:
        mask = prepend_ones(ctx, mask, f"{node.name} [mask, rank 4]", missing)
    spread = [mask.shape[i] == 1 and tensor.shape[2] != 1 for i, tensor in ((2, query), (3, key))]
    if not any(spread):
        return mask
    rows, columns = (network.add_slice(network.add_shape(x).get_output(0), (2,), (1,), (1,)) for x in (query, key))
    outer = network.add_slice(network.add_shape(mask).get_output(0), (0,), (2,), (1,))
    sizes = network.add_concatenation([each.get_output(0) for each in (outer, rows, columns)]).get_output(0)
    layer = network.add_slice(mask, (0,) * 4, (1,) * 4, (1, 1, *(0 if each else 1 for each in spread)))
    layer.set_input(2, sizes)
    layer.name = f"{node.name} [mask, spread]"
    return layer.get_output(0)


def _written_out(stack: Stack, ctx: Any, mask: Any, node: Node) -> Any:
    """``mask`` [B or 1, H or 1, L, S] as a tensor that is there: of a bool one that the graph broadcasts over L, in a
    network of known sizes, the fused kernels read something else.

    TensorRT-RTX 1.6.1, compute capability 9.0, mask [B, 1, 1, S]: off by 3.9 where values are of size 1, in fp16 and
    bf16, whether the graph expands it or we do; right where lengths are dynamic, and as a mask that is added
    (``tests/test_native_attention.py``).  And with True is the mask itself, and no view.
    """
    if mask.dtype != stack.trt.bool or any(size < 0 for size in mask.shape):
        return mask
    true = as_tensor(ctx, torch.ones(1, 1, *mask.shape[2:], dtype=torch.bool), f"{node.name} [true]")
    layer = ctx.net.add_elementwise(mask, true, stack.trt.ElementWiseOperation.AND)
    layer.name = f"{node.name} [mask, written out]"
    return layer.get_output(0)


def scaled(stack: Stack, ctx: Any, query: Any, scale: float, node: Node) -> Any:
    """``query * scale`` in the query's own type, as a product with one equal factor for each channel.

    TensorRT-RTX 1.4 lost a single factor, constant or computed, in front of a causal layer, as if the scale were 1:
    relative error 0.66 from length 500 on, at head sizes 64 and 128 (compute capability 9.0).  A factor for each
    channel it kept.  TensorRT-RTX 1.6 keeps both (``tests/test_scale_gpu.py``), and neither takes time: a
    prompt of 2048 (Qwen3 0.6B, H100) took 7.31 ms, and 7.32 with the scale in the weights.
    """
    factors = as_tensor(ctx, torch.full((1, 1, 1, query.shape[-1]), scale), f"{node.name} [scale]")
    factors = ctx.net.add_cast(factors, query.dtype).get_output(0)
    layer = ctx.net.add_elementwise(query, factors, stack.trt.ElementWiseOperation.PROD)
    layer.name = f"{node.name} [scaled query]"
    return layer.get_output(0)


def reshaped(net: Any, tensor: Any, shape: tuple[int, ...]) -> Any:
    """``tensor`` of the network ``net`` in another shape."""
    layer = net.add_shuffle(tensor)
    layer.reshape_dims = shape
    return layer.get_output(0)


def as_tensor(ctx: Any, value: Any, name: str) -> Any:
    """``value`` as a tensor of the network; lowering folds what does not hang on an input to a torch tensor."""
    from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

    return get_trt_tensor(ctx, value, name) if isinstance(value, torch.Tensor) else value
