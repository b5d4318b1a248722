"""The ``verify`` stage, a gate: logits against PyTorch one type wider, judged by PyTorch's own error.

Three ways compute the logits of the same tokens: the *reference*, eager PyTorch in fp32 (fp64 where the run is
fp32) on weights that were never rounded; the *yardstick*, eager PyTorch at the run's precision; and the
*candidate*, the engine.  The yardstick's error is what the precision costs anyway, so the candidate may have
``FACTOR`` times that much and no more.

fp16 has two arithmetics.  PyTorch adds up matrix products in fp32 unless it is told otherwise
(``torch.backends.cuda.matmul.allow_fp16_accumulation``); TensorRT-RTX adds them up in fp16 and has no switch: on an
H200 with RTX 1.4 its error on a product of 2048x8192 is 1.66e-3 and on 8192x2048 3.32e-3, to three digits
PyTorch's own with that switch on (2.1e-4 with it off).  An fp16 engine is therefore judged by PyTorch in the same
arithmetic, on the same inputs; the error of PyTorch as it ships stands beside it in every case.

fp32 has two as well: TensorRT-RTX 1.4 multiplies in TF32 although the builder's flag for it is cleared (relative
error 2.9e-3 on SmolLM2 at length 2, H200: benchmarks/profiles), and is judged by PyTorch in TF32; the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, isnan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.errors import RunError
from pipeline.cases import Case
from pipeline.generate import chat_tokens, greedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Forward = Callable[[dict[str, Tensor]], Tensor]
"""Inputs by name, each [batch, length] int64 -> logits [batch, 1 or length, vocabulary]."""

FACTOR = 3.0
"""Two computations at one precision have independent rounding errors of the same size; fusing, ordering and
accumulating differently moves that size by a small factor.  What was ever seen wrong was off by 100 times."""
NARROW = (torch.float16, torch.bfloat16)
CHUNK = 32  # positions compared at a time, few enough to stay in the cache: three times as fast as 256


@dataclass(frozen=True)
class Deviation:
    """How far logits are from the reference, over all real positions."""

    relative_error: float
    """||x - reference|| / ||reference||, Frobenius."""
    max_abs: float
    cosine: float
    kl: float
    """Mean over positions of KL(reference || x), in nats."""
    top1_agreement: float
    unexplained_flips: int
    """Positions whose most likely token differs although the reference's lead exceeds what rounding can turn."""


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


def fp16_accumulation() -> AbstractContextManager[None]:
    """PyTorch's matrix products of fp16 add up in fp16 while the block runs."""
    return _switched_on("allow_fp16_accumulation")


def tf32() -> AbstractContextManager[None]:
    """PyTorch's matrix products of fp32 round their factors to TF32 while the block runs."""
    return _switched_on("allow_tf32")


Arithmetic = Callable[[], AbstractContextManager[None]]


def engine_arithmetic(precision: str, flavour: str) -> dict[str, Arithmetic]:
    """In what arithmetic PyTorch is to judge an engine, by its name in the report; empty where it is PyTorch's own."""
    if precision == "fp16":
        return {"pytorch_fp16_accumulation": fp16_accumulation}
    if precision == "fp32" and flavour == "tensorrt_rtx":
        return {"pytorch_tf32": tf32}
    return {}


def in_arithmetic(forward: Forward, arithmetic: Arithmetic) -> Forward:
    """``forward`` as it computes in ``arithmetic``."""

    def run(inputs: dict[str, Tensor]) -> Tensor:
        with arithmetic():
            return forward(inputs)

    return run


def judge(
    cases: list[Case],
    inputs_of: Callable[[Case], tuple[dict[str, Tensor], Tensor | None]],
    reference: Forward,
    yardsticks: dict[str, Forward],
    candidate: Forward,
    precision_eps: float,
    progress: Callable[[int, int], object],
) -> dict[str, Any]:
    """Run every case three ways; returns the ``cases`` and ``passed`` of the report's ``verify`` section.

    ``yardsticks`` are PyTorch at the run's precision, by their name in the report; the last has the arithmetic of
    the candidate, and its error sets the tolerance.  ``inputs_of`` gives the inputs of a case and its padding mask
    [batch, length] or None.  ``precision_eps`` is the
    unit roundoff of the run's precision: even exact logits are rounded once when they are stored.
    """
    rows = []
    for number, case in enumerate(cases):
        inputs, padding = inputs_of(case)
        with torch.no_grad():
            logits = (forward(inputs) for forward in (*yardsticks.values(), candidate))
            *owns, got = compare(reference(inputs), logits, padding)
        own = owns[-1]
        tolerance = FACTOR * max(own.relative_error, precision_eps)
        allowed_kl = FACTOR**2 * max(own.kl, precision_eps**2)  # KL grows with the square of the error
        passed = got.relative_error <= tolerance and got.kl <= allowed_kl and got.unexplained_flips == 0
        rows.append(
            {
                **asdict(case),
                **asdict(got),
                "tolerance": tolerance,
                "allowed_kl": allowed_kl,
                **{name: asdict(deviation) for name, deviation in zip(yardsticks, owns, strict=True)},
                "passed": passed,
            }
        )
        progress(number + 1, len(cases))
    return {"cases": rows, "passed": all(row["passed"] for row in rows)}


def gate(section: dict[str, Any]) -> None:
    """Raises :class:`RunError` of kind ``accuracy`` naming the worst case, unless every case passed."""
    if section["passed"]:
        return
    failed = [row for row in section["cases"] if not row["passed"]]
    worst = _worst(failed)
    raise RunError(
        "accuracy",
        f"{len(failed)} of {len(section['cases'])} cases failed; worst {worst['name']}: relative error "
        f"{worst['relative_error']:.3g} where {worst['tolerance']:.3g} is allowed, "
        f"top-1 agreement {worst['top1_agreement']:.1%}",
    )


def cost(cases: list[dict[str, Any]], assumed: Collection[str]) -> dict[str, Any]:
    """The report's ``verify.outside``: judged ``cases`` that break what was ``assumed``, and the worst of them."""
    worst = _worst(cases)
    fields = ("name", "relative_error", "max_abs", "cosine", "kl", "top1_agreement")
    return {"assumed": list(assumed), "cases": cases, "worst": {name: worst[name] for name in fields}}


def _worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the largest relative error; NaN is the largest."""
    return max(rows, key=lambda row: inf if isnan(row["relative_error"]) else row["relative_error"])


def _real_positions(truth: Tensor, padding: Tensor | None) -> Tensor:
    """[n, 2]: the (row, position) pairs of ``truth`` [batch, 1 or length, V] that are not padding."""
    keep = torch.ones(truth.shape[:2], dtype=torch.bool, device=truth.device)
    if padding is not None:  # with the last position only, rows that end in padding say nothing
        keep = ~padding[:, -truth.shape[1] :].to(truth.device)
    return keep.nonzero()


def _dot(left: Tensor, right: Tensor) -> float:
    """Sum of ``left * right``, both [n, V]: each row in their type, the rows in float64."""
    return float(torch.linalg.vecdot(left, right).sum(dtype=torch.float64))


class _Sums:
    """What is added up over the real positions, a chunk of them at a time."""

    def __init__(self, truth: Tensor, padding: Tensor | None, logits: Tensor) -> None:
        if logits.shape != truth.shape:
            raise RunError("accuracy", f"logits of shape {tuple(logits.shape)}, not {tuple(truth.shape)}")
        positions = _real_positions(truth, padding)
        self.count = len(positions)
        if not self.count:
            raise RunError("accuracy", "a case without a single real position: nothing was compared")
        self.truth_square = self.difference = self.square = self.dot = self.kl = 0.0
        worst, flipped_leads = [], []
        for chunk in positions.split(CHUNK):
            where = (chunk[:, 0], chunk[:, 1])
            wanted, got = truth[where], logits[where].to(truth)
            delta, log_p = got - wanted, wanted.log_softmax(-1)
            self.truth_square += _dot(wanted, wanted)
            self.difference += _dot(delta, delta)
            self.square += _dot(got, got)
            self.dot += _dot(got, wanted)
            self.kl += _dot(log_p.exp(), log_p - got.log_softmax(-1))
            worst.append(delta.abs().max())
            lead = wanted[got.argmax(-1) != wanted.argmax(-1)].topk(2, dim=-1).values
            flipped_leads.append(lead[:, 0] - lead[:, 1])
        self.worst = float(torch.stack(worst).max())  # keeps NaN
        self.flipped_leads = torch.cat(flipped_leads)

    def deviation(self, explained_lead: float) -> Deviation:
        return Deviation(
            relative_error=(self.difference / self.truth_square) ** 0.5,
            max_abs=self.worst,
            cosine=self.dot / (self.truth_square * self.square) ** 0.5 if self.square else 0.0,
            kl=max(self.kl / self.count, 0.0),
            top1_agreement=1 - len(self.flipped_leads) / self.count,
            unexplained_flips=int((self.flipped_leads > explained_lead).sum()),
        )


def compare(truth: Tensor, logits: Iterable[Tensor], padding: Tensor | None) -> list[Deviation]:
    """How far each of ``logits`` is from ``truth``, all [batch, 1 or length, V], at the real positions.

    Of ``logits`` only one is held at a time: full logits are what most memory goes into.
    The comparison is made in the type of ``truth``.  The last of ``logits`` is the candidate, the one before it
    its yardstick: a lead of the most likely token over the second is taken as explained by rounding up to twice
    ``FACTOR`` times the largest error of the yardstick, since two logits compete.
    """
    sums = list(map(partial(_Sums, truth, padding), logits))  # the variable of a loop would keep the last ones
    explained = 2 * FACTOR * sums[-2].worst
    return [each.deviation(explained) for each in sums]


def widened(graph: GraphModule) -> GraphModule:
    """``graph`` with its weights as they are and its arithmetic in fp32, in place: for machines without a GPU,
    where fp16 takes minutes and says nothing about the GPU's rounding.  What is checked is the rewritten graph."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
        elif node.kwargs.get("dtype") in NARROW:
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
    graph.recompile()
    widened_parameters(graph)
    return graph


def widened_parameters(module: nn.Module) -> None:
    """The same weights, with their rounding, stored in fp32, in place."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype in NARROW:
            tensor.data = tensor.data.float()


def answers(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    candidate: Forward,
    yardstick: Forward,
    names: list[str],
    longest: int,
    device: torch.device,
    max_new_tokens: int = 16,
) -> dict[str, Any]:
    """The greedy answers of both to ``question``; a record for people, the gate is :func:`judge`."""
    stop = frozenset({tokenizer.eos_token_id} - {None})
    tokens = chat_tokens(tokenizer, question).to(device)
    with torch.no_grad():
        got, wanted = (
            list(greedy(forward, names, tokens, max_new_tokens, stop, longest)) for forward in (candidate, yardstick)
        )
    return {
        "question": question,
        "engine": tokenizer.decode(got, skip_special_tokens=True).strip(),
        "pytorch": tokenizer.decode(wanted, skip_special_tokens=True).strip(),
        "tokens_agree": got == wanted,
    }
