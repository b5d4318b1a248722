"""The native attention layer by itself, and whether TensorRT has a fused kernel for it: found out, not looked up.

``decomposable=False`` makes a build fail where no fused kernel exists.  So a network is built that holds nothing but
the layer as it is asked for, with the settings of the network that it is meant for.  That takes 0.02 to 0.1 s, whatever
the lengths (up to 16384 tokens tried; TensorRT-RTX 1.6 on two CPU cores).  A rule would have to know more than it can:
there is none in fp32, with a mask none for head sizes that are no multiple of 8, none for one head of one sequence, and
none for one query of two heads, where for one of four there is; and it would be another on the next GPU.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from passes.precision import PRECISIONS
from passes.private.of_torch_tensorrt import builder_config
from passes.proof.sizes import bounds_of
from passes.tensorrt.versions import Stack, first_error, stderr_held, tensorrt_errors

_log = logging.getLogger(__name__)

Extent = tuple[int, int]
"""Least and most of a size: the same where it is known, and a range where it is when the engine runs."""
UNBOUNDED = (1, 128)
"""Of a size without an upper bound: from one token, that of a decode step, to a short prompt."""


@dataclass(frozen=True)
class Asked:
    """An attention layer as a network asks for it."""

    dtype: str
    """The precision's name; TensorRT's where no run has it."""
    batch: Extent
    heads: tuple[int, int]
    """Of the queries; of keys and values."""
    queries: Extent
    keys: Extent
    size: int
    """Channels of a head."""
    causal: str
    mask: tuple[str, bool, bool] | None
    """Its type, and whether there is one for each sequence and for each head."""

    @classmethod
    def of(cls, stack: Stack, query: Any, key: Any, causal: str, mask: Any, traced: tuple[Any, Any]) -> Asked:
        """Of a network's tensors: query [B, Hq, L, D], key [B, Hkv, S, D], and mask [B or 1, Hq or 1, L, S] or None.
        ``traced``: the shapes of query and key in the graph, whose symbols have bounds, or those bounds."""
        return cls(
            dtype=_type_name(stack.trt, query.dtype),
            batch=extent(query.shape[0], traced[0][0]),
            heads=(query.shape[1], key.shape[1]),
            queries=extent(query.shape[2], traced[0][2]),
            keys=extent(key.shape[2], traced[1][2]),
            size=query.shape[3],
            causal=causal,
            mask=mask if mask is None else (_type_name(stack.trt, mask.dtype), mask.shape[0] != 1, mask.shape[1] != 1),
        )

    @property
    def shapes(self) -> dict[str, tuple[Extent, ...]]:
        """Of each tensor, [batch, heads, length, channels]."""
        (queries, keys), size = self.heads, (self.size, self.size)
        past = (self.batch, (keys, keys), self.keys, size)
        found: dict[str, tuple[Extent, ...]] = {}
        found |= {"query": (self.batch, (queries, queries), self.queries, size), "key": past, "value": past}
        if self.mask is not None:
            _, batch, heads = self.mask
            one = (1, 1)
            found["mask"] = (
                self.batch if batch else one,
                (queries, queries) if heads else one,
                self.queries,
                self.keys,
            )
        return found

    def __str__(self) -> str:
        kind = {"none": "no mask", "upper_left": "causal", "lower_right": "causal from the lower right"}[self.causal]
        if self.mask is not None:
            kind = "bool mask" if self.mask[0] == "BOOL" else "added mask"
        batch, queries, keys = (
            str(least) if least == most else f"{least}..{most}" for least, most in (self.batch, self.queries, self.keys)
        )
        heads = "{} query and {} key heads".format(*self.heads)
        return f"{self.dtype}, {kind}, {heads} of {self.size}, batch {batch}, {queries} x {keys} tokens"


def extent(size: int, traced: Any) -> Extent:
    """Of the network's ``size``, -1 where it is not known, which is ``traced`` in the graph, or within those bounds."""
    if size >= 0:
        return size, size
    if isinstance(traced, tuple):
        return traced
    if isinstance(traced, torch.SymInt):
        least, most = bounds_of(traced)
        if least is not None and most is not None and most < 2**31:  # TensorRT has no longer ones
            return least if least > 2 else 1, most  # torch.export writes 2 where it only means "no constant"
    return UNBOUNDED


def _type_name(trt: Any, dtype: Any) -> str:
    known = (each.name for each in PRECISIONS.values() if getattr(trt, each.torch_name) == dtype)
    return next(known, dtype.name)


def _type(trt: Any, name: str) -> Any:
    """Back from :func:`_type_name`."""
    return getattr(trt, PRECISIONS[name].torch_name) if name in PRECISIONS else getattr(trt.DataType, name)


def causal_kinds(trt: Any) -> dict[str, Any]:
    """Our name of a causal kind -> TensorRT's."""
    kinds = trt.CausalMaskKind
    return {"none": kinds.NONE, "upper_left": kinds.UPPER_LEFT, "lower_right": kinds.LOWER_RIGHT}


def add_layer(stack: Stack, network: Any, qkv: tuple[Any, Any, Any], causal: str) -> Any:
    """The native layer for query [B, Hq, L, D], key and value [B, Hkv, S, D]; None where TensorRT refuses it."""
    kind = causal_kinds(stack.trt)[causal]
    return network.add_attention_v2(*qkv, stack.trt.AttentionNormalizationOp.SOFTMAX, kind)


class FusedKernels:
    """What TensorRT has fused kernels for: each form of the layer is tried once, and remembered."""

    def __init__(
        self, answers: Mapping[str, str | None] | None = None, configure: Callable[[Any], Any] = builder_config
    ) -> None:
        """``answers``: of before, by this TensorRT for this GPU; ``configure`` makes the builder's configuration, of a
        Torch-TensorRT interpreter, and must be what makes it for the networks that the layers are meant for."""
        self.answers = dict(answers or {})
        """Form and settings -> None where there is one, else TensorRT's first error."""
        self.configure = configure

    def why_not(self, stack: Stack, settings: Any, asked: Asked) -> str | None:
        """None where there is one for ``asked`` under Torch-TensorRT's compilation ``settings``, or none can be told
        from what else is wrong; otherwise TensorRT's first error."""
        key = f"{asked!r} {_said(settings)}"
        if key not in self.answers:
            reason = self._refusal(stack, settings, asked, decomposable=False)
            if reason and self._refusal(stack, settings, asked, decomposable=True):
                return None  # it is not for want of a kernel: the build will say what is wrong, and may do better
            self.answers[key] = reason
            if reason:
                _log.warning(f"attention in pieces, since TensorRT has no fused kernel for {asked}: {in_short(reason)}")
        return self.answers[key]

    def _refusal(self, stack: Stack, settings: Any, asked: Asked, decomposable: bool) -> str | None:
        """TensorRT's first error, if it does not build the layer by itself."""
        from torch_tensorrt.dynamo.conversion import TRTInterpreter

        with tensorrt_errors() as errors, stderr_held():
            empty = torch.fx.GraphModule({}, torch.fx.Graph())
            interpreter = TRTInterpreter(empty, [], compilation_settings=settings)
            network, config = interpreter.ctx.net, self.configure(interpreter)
            inputs = []
            for name, extents in asked.shapes.items():
                dtype = asked.mask[0] if name == "mask" and asked.mask else asked.dtype
                shape = tuple(least if least == most else -1 for least, most in extents)
                inputs.append(network.add_input(name, _type(stack.trt, dtype), shape))
            query, key, value, *mask = inputs
            layer = add_layer(stack, network, (query, key, value), asked.causal)
            if layer is not None:
                if mask:
                    layer.mask = mask[0]
                layer.decomposable = decomposable
                network.mark_output(layer.get_output(0))
                _add_profile(interpreter.builder, config, asked)
                if interpreter.builder.build_serialized_network(network, config) is not None:
                    return None
        return first_error(errors)


def _add_profile(builder: Any, config: Any, asked: Asked) -> None:
    """The ranges of the sizes that are not known, if there are any."""
    if all(least == most for least, most in (asked.batch, asked.queries, asked.keys)):
        return
    profile = builder.create_optimization_profile()
    for name, extents in asked.shapes.items():
        least, most = zip(*extents, strict=True)
        profile.set_shape(name, least, most, most)
    config.add_optimization_profile(profile)


def in_short(reason: str) -> str:
    """What of TensorRT's error is about kernels; without that all of it."""
    found = re.search(r"[A-Z][^.]*\bkernels?\b[^.]*", reason)
    return found.group() if found else reason


def _said(settings: Any) -> dict[str, Any]:
    """The compilation settings that are not as Torch-TensorRT has them by itself, but for sets and objects."""
    plain = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.default is not MISSING and getattr(settings, field.name) != field.default
    }
    return {name: value for name, value in sorted(plain.items()) if isinstance(value, bool | int | float | str)}


@functools.cache
def of_this_process() -> FusedKernels:
    """Where nothing is kept for the next one."""
    return FusedKernels()
