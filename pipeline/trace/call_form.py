"""The ``export`` stage: ``torch.export`` of the chosen call form, with a static or dynamic sequence length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from passes.errors import AS_IT_IS, RunError, first_line
from passes.graph.prepare import prepare
from passes.private import of_torch
from passes.tensorrt.versions import quiet
from pipeline.config.schema import ModelConfig, ShapeConfig
from pipeline.model.attention import plain_attention
from pipeline.model.experts import plain_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class InputSpec:
    """One input [batch, length] of the traced program, length in min..max (tokens), or one of fixed ``sizes``.

    ``exact``: lengths for which the engine has an optimization profile of its own.
    """

    name: str
    batch: int
    min: int
    opt: int
    max: int
    sizes: tuple[int, ...] | None = None
    dtype: str = "int64"
    exact: tuple[int, ...] = ()

    @staticmethod
    def of(described: dict[str, Any]) -> InputSpec:
        """From an engine's manifest; one of before there was ``exact`` has none."""
        known = {key: value for key, value in described.items() if key in InputSpec.__dataclass_fields__}
        settled: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in known.items()}
        return InputSpec(**settled)

    @staticmethod
    def lengths(name: str, shape: ShapeConfig) -> InputSpec:
        """Tokens [batch, length], or what is told of each."""
        return InputSpec(name, shape.batch, shape.min, shape.opt, shape.max, exact=tuple(shape.exact))

    @property
    def dynamic(self) -> bool:
        return self.min != self.max

    def shape(self, length: int) -> tuple[int, ...]:
        return self.sizes or (self.batch, length)

    @staticmethod
    def places(batch: int) -> InputSpec:
        """``last`` [batch]: the place of each row's last token."""
        return InputSpec("last", batch, 1, 1, 1, sizes=(batch,))


@dataclass(frozen=True)
class Traced:
    """``program`` is functional, with attention intact; ``inputs`` are in the order of its arguments."""

    program: ExportedProgram
    inputs: tuple[InputSpec, ...]


class CallForm(nn.Module):
    """A causal LM called with the chosen inputs and without cache: what is traced, compiled, run and compared."""

    def __init__(self, model: PreTrainedModel, logits: str) -> None:
        super().__init__()
        self.model = model
        self.logits_to_keep = 1 if logits == "last" else 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """All [batch, length] int64, except ``last`` [batch]: the place of the one token in each row whose logits are
        asked for.  Returns logits [batch, 1 or length, vocabulary]."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        output = self.model(
            input_ids=input_ids,
            use_cache=False,
            logits_to_keep=self.logits_to_keep if last is None else last,
            **{name: value for name, value in given.items() if value is not None},
        )
        return output.logits if last is None else own_rows(output.logits)


def own_rows(logits: Tensor) -> Tensor:
    """[batch, 1, vocabulary] of ``logits`` [batch, batch, vocabulary], which has each row at the places of all of them:
    row b at the b-th."""
    return logits if len(logits) == 1 else logits.diagonal(dim1=0, dim2=1).permute(1, 0).unsqueeze(1)


def make_inputs(names: list[str], tokens: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
    """The inputs ``names`` for ``tokens`` [batch, length]; ``padding`` [batch, length] bool is True at padding.

    Positions count the real tokens, as Hugging Face's ``generate`` makes them for left padding.
    """
    real = torch.ones_like(tokens) if padding is None else (~padding).to(tokens.dtype)
    made = {
        "input_ids": tokens,
        "attention_mask": real,
        "position_ids": (real.cumsum(-1) - 1).clamp(min=0),
        "last": tokens.new_full((len(tokens),), tokens.shape[1] - 1),
    }
    return {name: made[name] for name in names}


def trace(form: CallForm, model: ModelConfig, shape: ShapeConfig, device: torch.device) -> Traced:
    """Export ``form``; raises :class:`RunError` of kind ``export`` where torch.export cannot."""
    specs = tuple(
        InputSpec.places(shape.batch) if name == "last" else InputSpec.lengths(name, shape) for name in model.inputs
    )
    tokens = torch.zeros(shape.batch, example_length(shape), dtype=torch.int64, device=device)
    inputs = make_inputs(model.inputs, tokens)
    dynamic = None
    if shape.kind == "dynamic":
        length = Dim("length", min=shape.min, max=shape.max)
        dynamic = {name: None if name == "last" else {1: length} for name in model.inputs}
    return Traced(exported(form, inputs, dynamic, of_one=ONE_LENGTH), specs)


def example_length(shape: ShapeConfig) -> int:
    """The length to trace with: neither 0, 1 nor a bound of the profile, so that none of them gets specialised."""
    return shape.max if shape.kind == "static" else max(shape.min, min(shape.max - 1, 11))


CALLED = re.compile(r"The following call raised this error:\s+(File .*)\s+(.*)")
"""The place and the line of code, in what torch says of a choice that hangs on data."""

ONE_LENGTH = "try shape=static, which is one length; "


class NumberFromData(RunError):
    """A program hangs on a number out of a tensor."""


def exported(
    form: nn.Module, inputs: dict[str, Any], dynamic: dict[str, Any] | None, remedy: str = AS_IT_IS, of_one: str = ""
) -> ExportedProgram:
    """``form`` traced with ``inputs``, in the form in which masks are read; raises :class:`RunError` of kind
    ``export``, which says ``remedy``, where torch.export cannot, and before it ``of_one`` where what it is told to
    leave open would have to be one number; and :class:`NumberFromData` where what it traced hangs on the data of a
    tensor."""
    try:
        with torch.no_grad(), quiet(), plain_experts(form.model), plain_attention(form.model), unchanged(form):
            program = torch.export.export(
                form,
                (),
                inputs,
                dynamic_shapes=dynamic,
                strict=False,
                # Guards that torch derives from kernel choices would narrow the length; check at run time instead.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            program = prepare(program)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        narrower = of_one if of_torch.wants_one_size(error) else ""
        raise RunError("export", f"{_why(form.model, error)}; {narrower}{remedy}") from error
    for node in program.graph.nodes:
        if node.target in NUMBERS_FROM_DATA and _is_read(node):
            name = type(form.model).__name__
            raise NumberFromData(
                "export", f"{name} reads a number out of a tensor ({node.name}), and no engine can; {remedy}"
            )
    return program


def _why(model: Any, error: Exception) -> str:
    """What of ``model`` torch.export could not trace, as far as its ``error`` tells."""
    name = type(model).__name__
    if isinstance(error, GuardOnDataDependentSymNode) and (line := CALLED.search(str(error))):
        return f"{name} does what the numbers in a tensor decide ({line[2].strip()}), and no engine can"
    if of_torch.wants_one_size(error):
        return f"{name} is another program at another length: a loop over tokens, or a choice by how many there are"
    return f"torch.export: {first_line(error)}"


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever modules of ``model`` come to hold while the block runs, they hold afterwards what they held before.

    What a model keeps from one call to the next (Phi-3 its long rotary factors) is a tensor without numbers while it is
    traced, and the model would compute with it ever after."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, held, buffers in before:
            vars(module).clear()
            vars(module).update(held)
            module._buffers.clear()
            module._buffers.update(buffers)


NUMBERS_FROM_DATA = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


def _is_read(number: Node) -> bool:
    """Whether a tensor hangs on ``number``, and not only assertions about it."""
    return any("val" in user.meta and (isinstance(user.meta["val"], Tensor) or _is_read(user)) for user in number.users)
