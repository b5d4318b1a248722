"""The arithmetics in which PyTorch is run to judge an engine, or the graph it is made from.

fp16 has two.  PyTorch adds up matrix products in fp32 unless it is told otherwise
(``torch.backends.cuda.matmul.allow_fp16_accumulation``); TensorRT-RTX adds them up in fp16 and has no switch: on an
H200 with RTX 1.4 its error on a product of 2048x8192 is 1.66e-3 and on 8192x2048 3.32e-3, to three digits
PyTorch's own with that switch on (2.1e-4 with it off).  TensorRT proper adds up in fp32, as PyTorch does.

fp32 has two as well: TensorRT-RTX 1.4 multiplies in TF32 although the builder's flag for it is cleared (relative
error 2.9e-3 on SmolLM2 at length 2, H200: benchmarks/profiles).

On a CPU torch's own products of fp16 and bf16 take up to thirty times what those of fp32 take.  :func:`on_cpu` gives
what they give in a fraction of the time: factors of 16 bits multiplied and added up in fp32, the result rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from passes.graph import cache_ops, local_attention, ops
from passes.precision import PRECISIONS, Products
from passes.private.of_torch import DispatchMode

Forward = Callable[[dict[str, Tensor]], Tensor]
"""Inputs by name, each [batch, length] int64 -> logits [batch, 1 or length, vocabulary]."""
Arithmetic = Callable[[], AbstractContextManager[Any]]

aten = torch.ops.aten
NARROW = tuple(each.dtype for each in PRECISIONS.values() if each.is_narrow)
PRODUCTS = frozenset(
    {
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default,
        aten.scaled_dot_product_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_attention_math.default, ops.NATIVE, cache_ops.CACHED,
        local_attention.WINDOWED, local_attention.CHUNKED,
    }
)  # fmt: skip
"""What multiplies and adds up; attention is one kernel, so nothing inside of it is rounded."""


@contextmanager
def _switched_on(flag: str) -> Iterator[None]:
    """``torch.backends.cuda.matmul``'s ``flag`` is True while the block runs."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, flag)
    setattr(matmul, flag, True)
    try:
        yield
    finally:
        setattr(matmul, flag, before)


@dataclass(frozen=True)
class _Switch:
    """How PyTorch is made to multiply as TensorRT-RTX does."""

    flag: str
    """Of ``torch.backends.cuda.matmul``."""
    words: str


SWITCHES: dict[Products, _Switch] = {
    "fp16_accumulation": _Switch("allow_fp16_accumulation", ", products added up in fp16"),
    "tf32": _Switch("allow_tf32", ", products of TF32"),
}


class _WideProducts(DispatchMode):
    """Each of :data:`PRODUCTS` over 16-bit tensors is computed in fp32 and rounded; all else runs as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ops.DECOMPOSED:  # an op of ours that stands for several, each of which rounds
            with self:
                return ops.written_out(*args, **kwargs)
        narrow = next((x.dtype for x in args if isinstance(x, Tensor) and x.dtype in NARROW), None)
        if func not in PRODUCTS or narrow is None:
            return func(*args, **kwargs)

        def widened(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.dtype in NARROW else x

        def rounded(x: Any) -> Any:
            return x.to(narrow) if isinstance(x, Tensor) and x.dtype == torch.float32 else x

        made = func(*map(widened, args), **{name: widened(x) for name, x in kwargs.items()})
        return tuple(map(rounded, made)) if isinstance(made, tuple) else rounded(made)


def on_cpu(precision: str) -> Arithmetic:
    """``precision``'s own arithmetic on a CPU, and fast: 16-bit numbers, products added up in fp32 and rounded."""
    return _WideProducts if PRECISIONS[precision].is_narrow else nullcontext


def of_engine(precision: str, flavour: str) -> dict[str, Arithmetic]:
    """In what arithmetic PyTorch is to judge an engine, by its name in the report; empty where it is PyTorch's own."""
    products = PRECISIONS[precision].rtx_products
    if flavour != "tensorrt_rtx" or products is None:
        return {}
    return {f"pytorch_{products}": partial(_switched_on, SWITCHES[products].flag)}


def yardsticks(executed: str, precision: str, flavour: str | None) -> dict[str, Arithmetic]:
    """The arithmetics of PyTorch that a candidate is judged beside, by their name in the report, the one that judges it
    last.  ``executed``: ``engine``, ``graph``, or the name of a rival; ``flavour``: of TensorRT."""
    if executed == "graph":
        return {"pytorch": on_cpu(precision)}
    return {"pytorch": nullcontext} | (of_engine(precision, flavour or "") if executed == "engine" else {})


def described(executed: str, precision: str, flavour: str | None) -> str:
    """What a verification computed in, and so what it has seen, in a line for people."""
    added_up = ", products added up in fp32" if PRECISIONS[precision].is_narrow else ""
    if executed == "graph":
        return f"{precision} on the CPU{added_up}; the engine and the GPU's kernels did not run"
    if executed != "engine":
        return f"{precision} on the GPU, as PyTorch has it"
    unlike = {f"pytorch_{name}": switch.words for name, switch in SWITCHES.items()}
    judge = unlike.get(list(yardsticks(executed, precision, flavour))[-1], added_up)
    return f"{precision} on the GPU, in the engine's kernels; judged by PyTorch in {precision}{judge}"


def in_arithmetic(forward: Forward, arithmetic: Arithmetic) -> Forward:
    """``forward`` as it computes in ``arithmetic``."""

    def run(inputs: dict[str, Tensor]) -> Tensor:
        with arithmetic():
            return forward(inputs)

    return run
