"""What the report says of a program's attention, and of the engine that it became."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from passes.graph.records import CallRecord, PassRecord
from pipeline.host.plain_json import from_json

if TYPE_CHECKING:
    from passes.graph.rewritten import Rewritten


@dataclass(frozen=True)
class AttentionSummary:
    """The calls, counted."""

    by_mask: dict[str, int]
    by_action: dict[str, int]
    assumed: tuple[str, ...]
    """The conditions on whose word a mask was dropped: outside of them the engine is wrong."""
    proof_seconds: float
    narrowed: int
    """Operations that run over fewer rows, since the others' are not read."""
    written_out: tuple[str, ...] = ()
    """Softmaxes of attention that is no call: the model's own code has it as products, and so has the engine."""

    def __str__(self) -> str:
        said = [f"{action}: {count}" for action, count in self.by_action.items()]
        return ", ".join(said + [f"written out by the model: {len(self.written_out)}"] * bool(self.written_out))


@dataclass(frozen=True)
class Attention:
    """What became of each attention call of a program."""

    calls: tuple[CallRecord, ...]
    summary: AttentionSummary
    passes: tuple[PassRecord, ...] = ()
    """In the order in which they ran; reports of schema 1 have none."""


def attention_of(rewritten: Rewritten) -> Attention:
    """The section of a program that a strategy has rewritten."""
    return from_json(Attention, rewritten.describe())


@dataclass(frozen=True)
class Unfused:
    """Native attention layers of one form that TensorRT has no fused kernel for, and may run in pieces."""

    layers: tuple[str, ...]
    form: str
    """Type, mask, heads and lengths, for which it was asked."""
    reason: str
    """TensorRT's first error, of a network that holds nothing else and insists on one."""


@dataclass(frozen=True)
class Engine:
    """What the network holds, and the engine that was built from it: null until then."""

    layers: int
    iattention: int
    """Native attention layers."""
    iattention_causal: int
    iattention_masked: int
    iattention_fused: int | None
    """Those that have a fused kernel; null: Torch-TensorRT's own converter made them, which does not say."""
    softmax: int
    """Softmax layers, as attention has that is written out."""
    weights: dict[str, int] = field(default_factory=dict)
    """Bytes of the network's constants, by type: ``int8``, ``int4``, ``fp8``, ``half`` and so on.  What TensorRT folds
    or needs twice makes the file another size."""
    unfused: tuple[Unfused, ...] = ()
    """The other native layers, by form."""
    passes: tuple[PassRecord, ...] = ()
    """What was done to the lowered graph, in that order."""
    torch_fallback_ops: tuple[str, ...] = ()
    """Always none: what TensorRT cannot take ends the run."""
    notes: tuple[str, ...] = ()
    file: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    target: str | None = None
    """The GPU that it was built for, or those that it was built for ahead of time."""
    profiles: tuple[tuple[int, int, int], ...] | None = None
    """Shortest, optimal and longest sequence (tokens) of each optimization profile."""


@dataclass(frozen=True)
class DecodeProgram:
    """The second program of a run with a KV cache, for the tokens after the prompt."""

    attention: Attention | None = None
    engine: Engine | None = None


@dataclass(frozen=True)
class ExportedFile:
    """A program that ``torch.export.load`` reads."""

    bytes: int
    sha256: str
    needs: tuple[str, ...]
    """What must be imported to load and run it."""
    target: str | None
    """The GPU that its engine was built for, or those that it was built for ahead of time; null: it has no engine."""
    executed: bool
    """Whether the verification ran what is in it; else it ran the engine that was made of it, or the graph that it was
    made of."""


@dataclass(frozen=True)
class Export:
    """What was written for those who have none of this project's code."""

    files: dict[str, ExportedFile]
    not_written: dict[str, str]
    """File -> why."""


@dataclass(frozen=True)
class Engines:
    """What a run's engines are: one, or with a KV cache the prompts' and that of the tokens after them."""

    attention: Attention
    engine: Engine
    decode: DecodeProgram | None
    notes: tuple[str, ...]
    """What the reader must know of how they were made."""


def engines_of(attention: dict[str, Attention], built: dict[str, Engine], notes: tuple[str, ...]) -> Engines:
    """From each program's, by the names of their files: ``engine``, and perhaps ``decode``."""
    decode = DecodeProgram(attention["decode"], built["decode"]) if "decode" in built else None
    return Engines(attention["engine"], built["engine"], decode, notes)
