"""The ``verify`` stage, a gate: logits against PyTorch one type wider, judged by PyTorch's own error.

Three ways compute the logits of the same tokens: the *reference*, eager PyTorch in fp32 (fp64 where the run is fp32) on
weights that were never rounded; the *yardstick*, eager PyTorch at the run's precision, in the arithmetic that the
candidate has (:mod:`pipeline.verify.arithmetic`); and the *candidate*, the engine.  The yardstick's error is what the
precision costs anyway, so the candidate may have ``FACTOR`` times that much and no more: over all positions together,
at each position by itself, and in each block of the vocabulary by itself.  One number over 2,048 positions does not see
sixteen that are wrong.

At one position the yardstick's error is one draw, and may be small by luck: of SmolLM2 in fp16 and bf16 on a CPU, two
computations that round independently are up to 5.4 times apart at one of 513 positions, and 2.3 to 2.6 where an error
below what 90 % of the positions stay below is taken as that.  So what PyTorch has at a position is taken as what all
but the worst hundredth of its positions have, where that is more (``LEVEL``), and a computation as accurate as PyTorch
may have ``FACTOR`` times that.  A candidate may be less accurate everywhere, up to ``FACTOR`` times over all positions;
how much it is, at the median position, widens what it may have at each of them, and at the median block what it may
have in each: there an error is looked for that stands out from the candidate's own, and a few that are wrong move no
median.

A constant added to every logit changes no probability, but is a difference all the same: no rounding adds one, so it
fails as any other error of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from math import inf, isnan
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes.errors import RunError
from pipeline.generate.greedy import chat_tokens, greedy
from pipeline.verify.arithmetic import Forward
from pipeline.verify.deviation import BLOCK, Difference, difference
from pipeline.verify.sections import (
    Answer,
    Case,
    JudgedCase,
    Judgement,
    Outlier,
    Outside,
    WorstBlock,
    WorstPosition,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTOR = 3.0
"""Two computations at one precision have independent rounding errors of the same size; fusing, ordering and
accumulating differently moves that size by a small factor.  What was ever seen wrong was off by 100 times."""
LEVEL = 0.99
"""The quantile of PyTorch's errors, over positions or blocks, below which an error of its own is luck."""


@dataclass(frozen=True)
class Limits:
    """What the candidate may differ from the reference by, from what its yardstick does."""

    relative_error: float
    """Over all positions together, as the next."""
    kl: float
    at: dict[str, Tensor]
    """[n] each: ``relative_error``, ``max_abs`` and ``kl`` at each position."""
    of_blocks: Tensor
    """[blocks]: the relative error of each block of the vocabulary."""
    lead: Tensor
    """[n]: a lead of the most likely token over the second that rounding can turn, since two logits compete."""


def limits(own: Difference, got: Difference, precision_eps: float) -> Limits:
    """By the yardstick's difference ``own``, of what differs by ``got``.  ``precision_eps`` is the unit roundoff of the
    run's precision: even exact logits are rounded once when they are stored."""
    whole = own.deviation(torch.zeros(1))
    factor = FACTOR * coarseness(own.relative_error, got.relative_error, precision_eps)
    in_blocks = coarseness(own.relative_error_of_blocks, got.relative_error_of_blocks, precision_eps)
    largest = _usual(own.max_abs).clamp(min=precision_eps * own.truth_max)
    return Limits(
        relative_error=FACTOR * max(whole.relative_error, precision_eps),
        kl=FACTOR**2 * max(whole.kl, precision_eps**2),  # KL grows with the square of the error
        at={
            "relative_error": factor * _usual(own.relative_error).clamp(min=precision_eps),
            "max_abs": factor * largest,
            "kl": factor**2 * _usual(own.kl).clamp(min=precision_eps**2),
        },
        of_blocks=FACTOR * in_blocks * _usual(own.relative_error_of_blocks).clamp(min=precision_eps),
        lead=2 * factor * largest,
    )


def coarseness(own: Tensor, got: Tensor, precision_eps: float) -> float:
    """How many times the yardstick's relative error ``own`` [n] the candidate's ``got`` [n] is at the median position,
    or block: from 1 to ``FACTOR``, which is as much as it may be over all of them."""
    share = got / own.clamp(min=precision_eps)
    median = float(share.nan_to_num(nan=inf).median())
    return min(max(median, 1.0), FACTOR)


def _usual(errors: Tensor) -> Tensor:
    """``errors`` [n], those below the quantile ``LEVEL`` raised to it."""
    return errors.clamp(min=float(errors.quantile(LEVEL)))


def judge(
    cases: list[Case],
    inputs_of: Callable[[Case], tuple[dict[str, Tensor], Tensor | None]],
    reference: Forward,
    yardsticks: dict[str, Forward],
    candidate: Forward,
    precision_eps: float,
    progress: Callable[[int, int], object],
) -> tuple[JudgedCase, ...]:
    """Run every case three ways.

    ``yardsticks`` are PyTorch at the run's precision, by their name in the report; the last has the arithmetic of
    the candidate, and its error sets the tolerance.  ``inputs_of`` gives the inputs of a case and its padding mask
    [batch, length] or None.  Raises :class:`RunError` of kind ``model`` where the reference's logits are not finite,
    and ``precision`` where PyTorch's own at the run's precision are not: then nothing can be judged by them.
    """
    rows = []
    for number, case in enumerate(cases):
        rows.append(_judged_case(case, *inputs_of(case), reference, yardsticks, candidate, precision_eps))
        progress(number + 1, len(cases))
    return tuple(rows)


def _judged_case(
    case: Case,
    inputs: dict[str, Tensor],
    padding: Tensor | None,
    reference: Forward,
    yardsticks: dict[str, Forward],
    candidate: Forward,
    precision_eps: float,
) -> JudgedCase:
    with torch.no_grad():
        truth = reference(inputs)
        logits = (forward(inputs) for forward in (*yardsticks.values(), candidate))
        *owns, got = differences(truth, logits, padding)
    first = case.length - truth.shape[1]
    for own in owns:
        _check_finite(own, case.name, first)
    judged = judged_by(owns[-1], got, precision_eps, first)
    lead = limits(owns[-1], owns[-1], precision_eps).lead
    by_themselves = {name: own.deviation(lead) for name, own in zip(yardsticks, owns, strict=True)}
    return JudgedCase(**vars(case), **vars(judged), yardsticks=by_themselves)


def _check_finite(own: Difference, name: str, first: int) -> None:
    """Raises :class:`RunError` where the reference or the yardstick that differs from it by ``own`` is not finite."""
    for numbers, kind, whose in (
        (own.truth_square, "model", "one type wider are not finite: its weights or activations are no numbers"),
        (own.error_square, "precision", "at the run's precision are not finite: the model does not fit its range"),
    ):
        if not numbers.isfinite().all():
            row, place = own.positions[int((~numbers.isfinite()).int().argmax())].tolist()
            raise RunError(kind, f"{name}: at row {row}, position {place + first}, PyTorch's own logits {whose}")


def differences(truth: Tensor, logits: Iterable[Tensor], padding: Tensor | None) -> list[Difference]:
    """How each of ``logits`` differs from ``truth``; only one is held at a time: full logits are what most memory goes
    into."""
    return list(map(partial(difference, truth, padding=padding), logits))  # a loop's variable would keep the last ones


def judged_by(own: Difference, got: Difference, precision_eps: float, first: int = 0) -> Judgement:
    """The candidate's difference ``got`` beside what the yardstick's, ``own``, allows; ``first``: the place in the
    sequence of the first position that was compared."""
    allowed = limits(own, got, precision_eps)
    whole = got.deviation(allowed.lead)
    shares = {name: _shares(getattr(got, name), limit) for name, limit in allowed.at.items()}
    at_positions = torch.stack(list(shares.values())).amax(0)  # NaN is the largest
    of_blocks = _shares(got.relative_error_of_blocks, allowed.of_blocks)
    failed = ~(at_positions <= 1) | (got.lead > allowed.lead)
    passed = (
        whole.relative_error <= allowed.relative_error
        and whole.kl <= allowed.kl
        and whole.unexplained_flips == 0
        and not failed.any()
        and bool((of_blocks <= 1).all())
    )
    return Judgement(
        **vars(whole),
        tolerance=allowed.relative_error,
        allowed_kl=allowed.kl,
        positions_judged=len(failed),
        positions_failed=int(failed.sum()),
        worst_position=_worst_position(got, allowed, shares, int(at_positions.argmax()), first),
        worst_block=_worst_block(got, allowed, int(of_blocks.argmax())),
        passed=passed,
    )


def _shares(found: Tensor, allowed: Tensor) -> Tensor:
    """``found`` of ``allowed``; infinite where it is no number."""
    return (found / allowed).where(found != 0, 0.0).nan_to_num(nan=inf)


def _worst_position(
    got: Difference, allowed: Limits, shares: dict[str, Tensor], worst: int, first: int
) -> WorstPosition:
    measure = max(shares, key=lambda name: float(shares[name][worst]))
    row, place = got.positions[worst].tolist()
    found, limit = float(getattr(got, measure)[worst]), float(allowed.at[measure][worst])
    return WorstPosition(row, first + place, measure, found, limit)


def _worst_block(got: Difference, allowed: Limits, worst: int) -> WorstBlock:
    found, limit = float(got.relative_error_of_blocks[worst]), float(allowed.of_blocks[worst])
    return WorstBlock(worst * BLOCK, (worst + 1) * BLOCK - 1, found, limit)


def gate(cases: Sequence[JudgedCase]) -> None:
    """Raises :class:`RunError` of kind ``accuracy`` naming the worst case, unless every case passed."""
    failed = [case for case in cases if not case.passed]
    if not failed:
        return
    worst = _worst(failed)
    position, block = worst.worst_position, worst.worst_block
    where = ""
    if worst.positions_failed:
        where = (
            f"; {worst.positions_failed} of {worst.positions_judged} positions, the worst at row {position.row}, "
            f"position {position.position}: {position.measure} {position.found:.3g} where {position.allowed:.3g} is "
            "allowed"
        )
    elif not block.relative_error <= block.allowed:
        where = (
            f"; tokens {block.first} to {block.last} of the vocabulary: relative error {block.relative_error:.3g} "
            f"where {block.allowed:.3g} is allowed"
        )
    raise RunError(
        "accuracy",
        f"{len(failed)} of {len(cases)} cases failed; worst {worst.name}: relative error {worst.relative_error:.3g} "
        f"where {worst.tolerance:.3g} is allowed, top-1 agreement {worst.top1_agreement:.1%}{where}",
    )


def outside(cases: tuple[JudgedCase, ...], assumed: Collection[str]) -> Outside:
    """What judged ``cases`` that break what was ``assumed`` show, and the worst of them."""
    worst = _worst(cases)
    return Outside(tuple(assumed), cases, Outlier(**{each.name: getattr(worst, each.name) for each in fields(Outlier)}))


def _worst(cases: Sequence[JudgedCase]) -> JudgedCase:
    """The one with the largest relative error; NaN is the largest."""
    return max(cases, key=lambda case: inf if isnan(case.relative_error) else case.relative_error)


def answers(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    candidate: Forward,
    yardstick: Forward,
    names: list[str],
    longest: int,
    device: torch.device,
    max_new_tokens: int = 16,
) -> Answer:
    """The greedy answers of both to ``question``; a record for people, the gate is :func:`judge`."""
    stop = frozenset({tokenizer.eos_token_id} - {None})
    tokens = chat_tokens(tokenizer, question).to(device)
    with torch.no_grad():
        got, wanted = (
            list(greedy(forward, names, tokens, max_new_tokens, stop, longest)) for forward in (candidate, yardstick)
        )
    ours, theirs = (tokenizer.decode(each, skip_special_tokens=True).strip() for each in (got, wanted))
    return Answer(question, ours, theirs, tokens_agree=got == wanted)
