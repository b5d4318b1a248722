"""What scripts of one's own use: what the masks of an exported program are, and what may be done about them."""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from passes.errors import UserError
from passes.graph import driver
from passes.graph.lowering_pass import rewrite_proved
from passes.graph.lowerings.lowering import ANY
from passes.graph.passes import PASSES
from passes.graph.prepare import prepare
from passes.graph.rewrite import DECOMPOSITIONS
from passes.graph.rewrite import rewrite as in_place
from passes.graph.rewritten import Rewritten
from passes.proof.calls import AttentionCall, find_calls
from passes.proof.masks import Proof, prover_of
from passes.tensorrt import registry
from passes.tensorrt.versions import load_stack

STRATEGIES = ("lowering", "detect_causal", "decompose")


class Classification(list[tuple[AttentionCall, Proof]]):
    """Every attention call of a graph with its proof; prints as a list of what was found."""

    def __str__(self) -> str:
        found: dict[str, list[str]] = {}
        for call, proof in self:
            found.setdefault(str(proof), []).append(call.name)
        return "\n".join(f"{_listed(names)}: {text}" for text, names in found.items())


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def classify(program: ExportedProgram, assume: Collection[str] = ()) -> Classification:
    """What the mask of each attention call of ``program`` is; ``assume`` names
    :data:`passes.proof.conditions.CONDITIONS` to rely on.

    Takes what ``torch.export.export`` gives, and leaves it as it is.  Raises :class:`passes.errors.RunError` of kind
    ``no_attention`` for a graph without attention ops.
    """
    program = prepare(_copied(program))
    prover = prover_of(program, assume)
    return Classification((call, prover.prove(call)) for call in find_calls(program.graph_module))


def rewrite(
    program: ExportedProgram,
    strategy: str = "lowering",
    unproven: str | None = None,
    assume: Collection[str] = (),
    without: Collection[str] = (),
) -> Rewritten:
    """``program`` with its attention calls rewritten, in aten ops alone, and what became of each call.

    ``program`` is what ``torch.export.export`` gives, and is left as it is; the result shares its weights.
    ``strategy``: ``lowering`` (or ``detect_causal``, which comes to the same here): a call whose mask is proved causal
    gets ``is_causal=True`` instead, one whose mask blocks nothing gets none, any other stays as it is; ``decompose``:
    every call as matmul, softmax, matmul.  ``unproven``: ``error`` raises :class:`passes.errors.RunError` of kind
    ``unproven`` where a mask is not proved, ``force`` (``lowering``) drops it all the same.  ``assume`` names
    :data:`passes.proof.conditions.CONDITIONS` that hold for every input, you say; ``without`` passes that are left
    out: ``group_heads``, ``narrow_rows``.
    Raises :class:`passes.errors.UserError` for other names, and :class:`passes.errors.RunError` of kind
    ``no_attention`` for a graph without attention ops.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"strategy={strategy}: allowed here: {', '.join(STRATEGIES)}")
    allowed = driver.optional(PASSES)
    for each in without:
        if each not in allowed:
            raise UserError(f"without={each}: allowed: {', '.join(allowed)}")
    done = in_place(_copied(program), strategy, unproven, assume, ANY, without)
    if any(node.target in DECOMPOSITIONS for node in done.program.graph.nodes):
        return replace(done, program=done.program.run_decompositions(dict(DECOMPOSITIONS)))
    return done


def native_attention() -> AbstractContextManager[None]:
    """While the block runs, Torch-TensorRT converts attention by our converter (:mod:`passes.tensorrt.attention`).

    It takes the place of the installed ones for ``scaled_dot_product_attention`` and for the kernels that torch makes
    of it, wherever :func:`passes.tensorrt.registry.takes` says that it is right; raises
    :class:`passes.errors.UserError` where Torch-TensorRT is not installed.
    """
    return registry.registered(registry.NATIVE_ATTENTION)


def register() -> None:
    """From now on Torch-TensorRT proves the masks of every graph that it compiles, and converts attention by our
    converter, until :func:`unregister`.

    For scripts that stay as they are: ``torch_tensorrt.compile``, ``torch_tensorrt.dynamo.compile`` and
    ``torch.compile(backend="torch_tensorrt")``.  A mask that is not proved stays where it is.
    """
    registry.NATIVE_ATTENTION.add()
    registry.add_lowering_pass(_prove)


def unregister() -> None:
    """Torch-TensorRT is as it was before :func:`register`."""
    registry.NATIVE_ATTENTION.remove()
    registry.remove_lowering_pass(_prove)


def _prove(graph_module: GraphModule, settings: Any) -> GraphModule:
    rewrite_proved(graph_module)
    return graph_module


def load_torch_tensorrt() -> ModuleType:
    """``import torch_tensorrt``, also on a machine without a GPU, where the import alone fails: it asks for the current
    device.  Raises :class:`passes.errors.UserError` where it is not installed."""
    return load_stack().torch_tensorrt


def _copied(program: ExportedProgram) -> ExportedProgram:
    """A copy that shares the tensors: nothing here writes into one."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return copy.deepcopy(program, {id(tensor): tensor for tensor in tensors})
