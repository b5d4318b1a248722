"""Of PyTorch: an operation's schema, modes that see every operation, one for many tensors, and what dynamo counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph

from passes.private.part import attribute, part

Operation: Any = type(torch.ops.aten.add.Tensor)
"""The type of ``torch.ops.aten.add.Tensor`` and its like."""

DispatchMode: Any = part("torch.utils._python_dispatch:TorchDispatchMode")
"""What a mode is made of that sees every operation, below autograd."""


def schema_of(target: Any) -> Any:
    """Of a node's target: its ``arguments``, its ``returns``, whether it ``is_mutable``; None of what is no operation
    of torch's."""
    return attribute(target, "_schema") if isinstance(target, Operation) else None


def writes(target: Any) -> bool:
    """Whether a node's target is an operation that writes to one of its arguments."""
    schema = schema_of(target)
    return schema is not None and bool(schema.is_mutable)


def is_composite(operation: Any) -> bool:
    """Whether torch has ``operation`` as other operations alone, so that decompositions put those in its place."""
    return bool(operation.has_kernel_for_dispatch_key(part("torch._C:DispatchKey.CompositeImplicitAutograd")))


def wants_one_size(error: BaseException) -> bool:
    """Whether ``torch.export`` raised ``error`` because a size that it was told to leave open has to be one number."""
    kind = part("torch._dynamo.exc:UserErrorType")
    return getattr(error, "error_type", None) is kind.CONSTRAINT_VIOLATION


def with_numbers() -> AbstractContextManager[None]:
    """A block in which tensors that are made hold numbers, also inside of a mode in which none does, as the one is in
    which ``torch.compile`` calls its back ends."""
    block: AbstractContextManager[None] = part("torch._subclasses.fake_tensor:unset_fake_temporarily")()
    return block


def drop_workspaces() -> None:
    """Free cuBLAS' workspaces on the GPU; the next product makes its own."""
    part("torch._C:_cuda_clearCublasWorkspaces")()


def compiled_graphs() -> int:
    """How many graphs ``torch.compile`` has made in this process."""
    return int(part("torch._dynamo.utils:counters")["stats"]["unique_graphs"])


def skipped_cuda_graphs() -> int:
    """How often ``torch.compile`` was asked for a CUDA graph and did without."""
    return int(part("torch._dynamo.utils:counters")["inductor"]["cudagraph_skips"])


def stays_in_place(tensor: torch.Tensor) -> None:
    """``torch.compile`` may rely on the address of ``tensor``, which a CUDA graph then reads and writes there."""
    part("torch._dynamo:mark_static_address")(tensor)


def set_to_zero(tensors: list[torch.Tensor]) -> None:
    """All of them by one kernel."""
    part("torch:_foreach_zero_")(tensors)


def scaled_product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What multiplies ``a`` [n, k] by the transpose of ``b`` [m, k] in E4M3 with one scale each, as of its first call
    without rounding them anew; the result has their type."""
    one = torch.ones((), device=a.device)
    small, turned = (x.to(torch.float8_e4m3fn) for x in (a, b))
    multiply = part("torch:_scaled_mm")
    return lambda: multiply(small, turned.t(), scale_a=one, scale_b=one, out_dtype=a.dtype)


def compile_error() -> type[Exception]:
    """What ``torch.compile`` raises for what it cannot do."""
    found: type[Exception] = part("torch._dynamo.exc:TorchDynamoException")
    return found


def called_as(graph: Graph, program: ExportedProgram) -> None:
    """Have ``graph`` take its inputs and give its outputs, which are those of ``program``, in the nested form in which
    ``program`` was traced."""
    form, spec = part("torch.fx.graph:_PyTreeInfo"), program.call_spec
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    graph.set_codegen(part("torch.fx.graph:_PyTreeCodeGen")(form(names, spec.in_spec, spec.out_spec)))
