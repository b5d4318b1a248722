"""The gate of generation: every generated token must be PyTorch's greedy choice, up to what rounding can turn.

One forward pass over a prompt and what was generated after it gives PyTorch's logits at every generated position,
each given the candidate's own tokens before it (teacher forcing).  So not only the first difference is judged: after
a difference that rounding explains, the tokens that follow are still compared, with the continuation that was taken.

A difference is explained where PyTorch's own logits at the run's precision put the two tokens closer together than the
precision's error.  That error is measured, as in :mod:`pipeline.verify.logits`: the largest distance, at that position,
between these logits and those of PyTorch one type wider; ``FACTOR`` times that for each of the two logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from passes.errors import RunError
from pipeline.trace.call_form import make_inputs
from pipeline.verify.arithmetic import Forward
from pipeline.verify.logits import FACTOR
from pipeline.verify.sections import JudgedGeneration


def judge_generation(
    prompt: Tensor,
    generated: Tensor,
    padding: Tensor | None,
    forward: Forward,
    reference: Forward,
    vocabulary: int,
    precision_eps: float,
    name: str = "generation",
) -> JudgedGeneration:
    """Judge ``generated`` [batch, new] int64, which continues ``prompt`` [batch, length].

    ``forward`` is eager PyTorch at the run's precision and ``reference`` one type wider; both give logits
    [batch, positions, vocabulary] of all positions, or of the last ``new`` at least.  ``padding`` [batch, length] bool
    is True at padding, which must be on the left.  ``precision_eps`` is the unit roundoff of the run's precision: even
    exact logits are rounded once when they are stored.
    """
    batch, new = generated.shape
    outside = generated[(generated < 0) | (generated >= vocabulary)]
    if len(outside):  # looked up on a GPU, it would end the process
        raise RunError("accuracy", f"{name}: token {int(outside[0])} is none of the model's {vocabulary}")
    sequence = torch.cat([prompt, generated[:, :-1].to(prompt)], dim=1)
    names = ["input_ids"]
    if padding is not None:
        names += ["attention_mask", "position_ids"]
        padding = torch.cat([padding, padding.new_zeros(batch, new - 1)], dim=1)
    inputs = make_inputs(names, sequence, padding)
    with torch.no_grad():
        logits, truth = (_last(each(inputs), new) for each in (forward, reference))
    flips: list[tuple[int, float, float]] = []
    narrowest = inf
    for at in range(new):  # a position at a time: full logits in float64 are what most memory would go into
        wide = truth[:, at]
        if not wide.isfinite().all():
            raise RunError("model", f"{name}: PyTorch's own logits one type wider are not finite at new token {at}")
        own = logits[:, at].to(wide)
        error = (own - wide).abs().amax(-1).clamp(min=precision_eps * float(wide.abs().max()))
        allowed = 2 * FACTOR * error  # two logits compete
        narrowest = min(narrowest, float(allowed.min()))
        chosen = generated[:, at : at + 1].to(own.device)
        gap = own.amax(-1) - own.gather(-1, chosen)[:, 0]
        for row in (~(gap == 0)).nonzero()[:, 0].tolist():  # NaN is a flip too
            flips.append((at, float(gap[row]), float(allowed[row])))
    passed = all(gap <= limit for _, gap, limit in flips)
    _, worst_gap, allowed_gap = max(flips, key=lambda flip: _share(*flip[1:]), default=(0, 0.0, narrowest))
    return JudgedGeneration(
        name, batch * new, min((at for at, *_ in flips), default=None), len(flips), worst_gap, allowed_gap, passed
    )


def _share(gap: float, limit: float) -> float:
    """``gap`` of ``limit``; what is no number is the worst."""
    return gap / limit if gap == gap and limit == limit and limit > 0 else inf


def _last(logits: Tensor, new: int) -> Tensor:
    if logits.dim() != 3 or logits.shape[1] < new:
        raise ValueError(f"logits {tuple(logits.shape)}: {new} positions are judged")
    return logits[:, -new:]


def gate(cases: Sequence[JudgedGeneration]) -> None:
    """Raises :class:`RunError` of kind ``accuracy`` naming the worst case, unless every case passed."""
    failed = [case for case in cases if not case.passed]
    if not failed:
        return
    worst = max(failed, key=lambda case: _share(case.worst_gap, case.allowed_gap))
    raise RunError(
        "accuracy",
        f"{len(failed)} of {len(cases)} generations failed; worst {worst.name}: {worst.flips} of "
        f"{worst.tokens} tokens are not PyTorch's, first new token {worst.first_difference}, logits "
        f"{worst.worst_gap:.3g} apart where {worst.allowed_gap:.3g} is allowed",
    )


def last_positions(model: Any, new: int) -> Forward:
    """``model``'s forward with the logits of the last ``new`` positions, as :func:`judge_generation` takes it."""
    from pipeline.trace.call_form import CallForm

    form = CallForm(model, "all")
    form.logits_to_keep = new
    run: Callable[..., Tensor] = form
    return lambda inputs: run(**inputs)
