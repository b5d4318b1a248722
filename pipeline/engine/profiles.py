"""Optimization profiles: what TensorRT chooses kernels for, a range of lengths or a single one.

Profile 0 serves every length of the shape's range; each further one serves one exact length, at which it is faster
(Qwen2.5-0.5B at 2048 tokens, H200, TensorRT-RTX 1.4, ``benchmarks/results``: 6.42 ms by profile 0, 5.19 ms by its own,
a KV cache filled with it, and 5.06 ms by a static engine).  Weights are shared, so the engine hardly
grows.
``torch_tensorrt.Input(profiles=...)`` would make them from 2.14 on; 2.11 has no such thing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Shapes = tuple[tuple[int, ...], ...]
"""Of an engine's dynamic inputs, in their order."""


def add(builder: Any, net: Any, config: Any, exact: Iterable[int]) -> list[Any]:
    """To the builder's ``config`` a profile for each length of ``exact`` (tokens): every dynamic dimension has it."""
    made = []
    for length in exact:
        profile = builder.create_optimization_profile()
        for name, sizes in _dynamic(net):
            shape = tuple(length if size < 0 else size for size in sizes)
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
        made.append(profile)
    return made


def lengths(net: Any, profile: Any) -> tuple[int, int, int]:
    """Shortest, optimal and longest sequence (tokens) of ``profile``, an ``IOptimizationProfile``."""
    name, sizes = _dynamic(net)[0]
    least, best, most = (tuple(shape)[sizes.index(-1)] for shape in profile.get_shape(name))
    return least, best, most


def _dynamic(net: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the inputs of a network whose length is open: -1 in the shape."""
    inputs = [net.get_input(i) for i in range(net.num_inputs)]
    return [(each.name, tuple(each.shape)) for each in inputs if -1 in tuple(each.shape)]


def exact(engine: Any, dynamic: list[str]) -> dict[Shapes, int]:
    """The number of the profile for each exact shape of the ``dynamic`` inputs of ``engine``, an ``ICudaEngine``."""
    return {
        tuple(tuple(engine.get_tensor_profile_shape(name, i)[0]) for name in dynamic): i
        for i in range(1, engine.num_optimization_profiles)
    }
