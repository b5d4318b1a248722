"""Optimization profiles: what TensorRT chooses kernels for, a range of lengths or a single one.

Profile 0 serves every length of the shape's range; each further one serves one exact length, at which it is faster
(Qwen2.5-0.5B at 2048 tokens, H200, TensorRT-RTX 1.4, ``benchmarks/results``: 6.42 ms by profile 0, 5.19 ms by its own,
a KV cache filled with it, and 5.06 ms by a static engine).  Weights are shared, so the engine hardly
grows.
"""

from __future__ import annotations

from typing import Any

from pipeline.trace.call_form import InputSpec

Shapes = tuple[tuple[int, ...], ...]
"""Of an engine's dynamic inputs, in their order."""


def of(spec: InputSpec) -> list[dict[str, tuple[int, ...]]]:
    """Those of an open input, in their order, as ``torch_tensorrt.Input(profiles=...)`` takes them."""
    ranges = [(spec.min, spec.opt, spec.max), *((length,) * 3 for length in spec.exact)]
    return [dict(zip(("min_shape", "opt_shape", "max_shape"), map(spec.shape, each), strict=True)) for each in ranges]


def lengths(net: Any, profile: Any) -> tuple[int, int, int]:
    """Shortest, optimal and longest sequence (tokens) of ``profile``, an ``IOptimizationProfile``."""
    inputs = (net.get_input(i) for i in range(net.num_inputs))
    name, sizes = next((each.name, tuple(each.shape)) for each in inputs if -1 in tuple(each.shape))
    least, best, most = (tuple(shape)[sizes.index(-1)] for shape in profile.get_shape(name))
    return least, best, most


def exact(engine: Any, dynamic: list[str]) -> dict[Shapes, int]:
    """The number of the profile for each exact shape of the ``dynamic`` inputs of ``engine``, an ``ICudaEngine``."""
    return {
        tuple(tuple(engine.get_tensor_profile_shape(name, i)[0]) for name in dynamic): i
        for i in range(1, engine.num_optimization_profiles)
    }
