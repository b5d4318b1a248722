"""The ``verify`` stage, a gate: logits against PyTorch one type wider, judged by PyTorch's own error.

Three ways compute the logits of the same tokens: the *reference*, eager PyTorch in fp32 (fp64 where the run is
fp32) on weights that were never rounded; the *yardstick*, eager PyTorch at the run's precision; and the
*candidate*, the engine.  The yardstick's error is what the precision costs anyway, so the candidate may have
``FACTOR`` times that much and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.errors import RunError
from pipeline.config import ShapeConfig, VerifyConfig
from pipeline.generate import chat_tokens, greedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Forward = Callable[[dict[str, Tensor]], Tensor]
"""Inputs by name, each [batch, length] int64 -> logits [batch, 1 or length, vocabulary]."""

FACTOR = 3.0
"""Two computations at one precision have independent rounding errors of the same size; fusing, ordering and
accumulating differently moves that size by a small factor.  What was ever seen wrong was off by 100 times."""
NARROW = (torch.float16, torch.bfloat16)
CHUNK = 256  # positions compared at a time: bounds the memory of the comparison, not its result


@dataclass(frozen=True)
class Case:
    name: str
    length: int
    padding: str
    """``none``, ``left`` or ``right``: every second row, and the only one, is padded by a third."""
    sample: int


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


def cases(config: VerifyConfig, shape: ShapeConfig, padded: bool) -> list[Case]:
    """Both ends of the profile, odd lengths, around 512, and the maximum; with padding where there is a mask for it."""
    lengths = config.lengths or [n for n in (shape.min, 7, 77, 511, 512, 513, shape.max) if shape.min <= n <= shape.max]
    found = []
    for length in sorted(set(lengths)):
        for padding in ("none", "left", "right") if padded and length > 2 else ("none",):
            for sample in range(config.samples):
                suffix = ("" if padding == "none" else f"_{padding}_padding") + (f"_{sample}" if sample else "")
                found.append(Case(f"length_{length}{suffix}", length, padding, sample))
    return found


def padding_mask(case: Case, batch: int) -> Tensor | None:
    """[batch, length] bool, True at padding; None without padding."""
    if case.padding == "none":
        return None
    mask = torch.zeros(batch, case.length, dtype=torch.bool)
    pad = case.length // 3
    rows = slice(0, None, 2)
    if case.padding == "left":
        mask[rows, :pad] = True
    else:
        mask[rows, case.length - pad :] = True
    return mask


def judge(
    cases: list[Case],
    inputs_of: Callable[[Case], tuple[dict[str, Tensor], Tensor | None]],
    reference: Forward,
    yardstick: Forward,
    candidate: Forward,
    precision_eps: float,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Run every case three ways; returns the ``cases`` and ``passed`` of the report's ``verify`` section.

    ``inputs_of`` gives the inputs of a case and its padding mask [batch, length] or None.  ``precision_eps`` is the
    unit roundoff of the run's precision: even exact logits are rounded once when they are stored.
    """
    rows = []
    for number, case in enumerate(cases):
        inputs, padding = inputs_of(case)
        with torch.no_grad():
            truth = reference(inputs)
            own = _deviation(yardstick(inputs), truth, padding, None)
            tolerance = FACTOR * max(own.relative_error, precision_eps)
            # A token's lead can be turned by the errors of the two that compete.
            got = _deviation(candidate(inputs), truth, padding, 2 * FACTOR * own.max_abs)
        allowed_kl = FACTOR**2 * max(own.kl, precision_eps**2)  # KL grows with the square of the error
        passed = got.relative_error <= tolerance and got.kl <= allowed_kl and got.unexplained_flips == 0
        rows.append(
            {
                **asdict(case),
                **asdict(got),
                "tolerance": tolerance,
                "allowed_kl": allowed_kl,
                "pytorch": asdict(own),
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
    worst = max(failed, key=lambda row: row["relative_error"] if row["relative_error"] == row["relative_error"] else 1e30)
    raise RunError(
        "accuracy",
        f"{len(failed)} of {len(section['cases'])} cases failed; worst {worst['name']}: relative error "
        f"{worst['relative_error']:.3g} where {worst['tolerance']:.3g} is allowed, "
        f"top-1 agreement {worst['top1_agreement']:.1%}",
    )


def _positions(logits: Tensor, truth: Tensor, padding: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks [n, vocabulary] of both, at the real positions, in float64."""
    if padding is not None and logits.shape[1] == padding.shape[1]:
        keep = ~padding.to(logits.device)
    elif padding is not None:  # the last position only: rows that end in padding say nothing
        keep = ~padding[:, -1:].to(logits.device)
    else:
        keep = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    where = keep.nonzero()
    for part in where.split(CHUNK):
        yield logits[part[:, 0], part[:, 1]].double(), truth[part[:, 0], part[:, 1]].to(logits.device).double()


def _deviation(logits: Tensor, truth: Tensor, padding: Tensor | None, lead: float | None) -> Deviation:
    if logits.shape != truth.shape:
        raise RunError("accuracy", f"logits of shape {tuple(logits.shape)} instead of {tuple(truth.shape)}")
    difference = norm = own_norm = dot = kl = worst = 0.0
    same = count = unexplained = 0
    for got, wanted in _positions(logits, truth, padding):
        delta = got - wanted
        difference += delta.square().sum().item()
        norm += wanted.square().sum().item()
        own_norm += got.square().sum().item()
        dot += (got * wanted).sum().item()
        worst = max(worst, delta.abs().max().item()) if not delta.isnan().any() else float("nan")
        log_p, log_q = wanted.log_softmax(-1), got.log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree = got.argmax(-1) == wanted.argmax(-1)
        same, count = same + int(agree.sum()), count + len(agree)
        if lead is not None:
            top2 = wanted.topk(2, dim=-1).values
            unexplained += int((~agree & (top2[:, 0] - top2[:, 1] > lead)).sum())
    if not count:
        return Deviation(0.0, 0.0, 1.0, 0.0, 1.0, 0)
    return Deviation(
        relative_error=(difference / norm) ** 0.5,
        max_abs=worst,
        cosine=dot / (norm * own_norm) ** 0.5 if own_norm else 0.0,
        kl=max(kl / count, 0.0),
        top1_agreement=same / count,
        unexplained_flips=unexplained,
    )


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
