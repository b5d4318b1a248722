"""What the precision costs: the model as it is executed beside the unquantised one, on the same real text.

Kept apart from whether an engine is right (:mod:`pipeline.verify.stage`), which is asked against PyTorch with the very
weights that the engine has.  Here the reference has those of the checkpoint, one type wider than the run.  Both give a
probability to each token of a text, given the same tokens before it; what differs is the precision alone, so the rise
of perplexity is taken token by token, and its interval is narrower than that of either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, nan, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes.errors import RunError
from pipeline.config.schema import ModelConfig, StrategyConfig
from pipeline.config.verification import VerifyConfig
from pipeline.model.load import LoadedModel, load_reference
from pipeline.model.real_text import RealText, real_text
from pipeline.verify.scored import ONE_PLACE_TOKENS, Scored, scored
from pipeline.verify.sections import Estimate, GreedyTexts, PrecisionCost, Quality
from pipeline.verify.tokens import last_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.verify.candidate import Machine

TOKENS = {"cuda": 20_000, "cpu": 2_000}
"""How many are predicted at least."""
BLOCK = 50
"""Tokens in a block: what neighbours have in common stays inside of one, so blocks are independent of each other
(method of batch means; Law, Simulation Modeling and Analysis, section 9.5.3)."""
NORMAL_95 = 1.96
PASS_TOKENS, PASS_PLACES = 8192, 1024
"""Of one pass of the reference, at most: a pass of few tokens leaves a GPU idle, logits of many fill it."""
CHUNK = 64  # positions compared at a time
NEW_TOKENS = {"cuda": 64, "cpu": 32}
TEXTS = {"cuda": 8, "cpu": 1}
"""Greedy continuations, at least: as many as the engine takes at once."""


def text_for(asked: VerifyConfig, loaded: LoadedModel) -> RealText | str:
    """The text on which ``loaded`` is to be measured; or why that would say nothing.  Raises :class:`UserError`."""
    if loaded.weights == "random":
        return "random weights predict no text"
    if loaded.came_as is not None:
        return f"the checkpoint's weights come as {loaded.came_as}, with no unquantised ones to compare with"
    if loaded.tokenizer is None:
        return "the model has no tokenizer"
    return real_text(asked.text, loaded, TOKENS[loaded.model.device.type] + 1)


def judge(
    what: Machine,
    loaded: LoadedModel,
    form: ModelConfig,
    strategy: StrategyConfig,
    asked: VerifyConfig,
    text: RealText | str | None,
    number_type: str,
    progress: Callable[[str, int, int], object],
) -> Quality:
    """What the precision of ``what`` costs on ``text``, see :func:`text_for`.  Hand it to :func:`gate`."""
    allowed = asked.max_perplexity_increase
    if not isinstance(text, RealText):
        return Quality(text, None, allowed, None)
    same = replace(form, revision=loaded.revision)  # a branch may have moved since
    wide = load_reference(same, number_type, loaded.model.device, 0)  # of weights that are not random
    cost = cost_of(scored(what, loaded, form, strategy, number_type), wide, text, progress)
    return Quality(None, cost, allowed, _passed(cost, allowed))


def _passed(cost: PrecisionCost, allowed: float | None) -> bool:
    found = cost.increase.value
    return isfinite(found) and (allowed is None or found <= allowed)


def gate(quality: Quality) -> None:
    """Raises :class:`RunError` of kind ``quality`` where more was lost than is allowed."""
    if quality.cost is None or quality.passed:
        return
    cost, limit = quality.cost, quality.max_increase
    found = f"{cost.increase.value:+.2%} ({cost.increase.low:+.2%} to {cost.increase.high:+.2%})"
    allowed = "" if limit is None else f" where verify.max_perplexity_increase={limit} allows {limit:+.2%}"
    raise RunError(
        "quality",
        f"perplexity {cost.perplexity.value:.4g} beside {cost.reference_perplexity.value:.4g} of {cost.reference}: "
        f"{found}{allowed}, over {cost.tokens} tokens; top-1 agreement {cost.top1_agreement:.1%}",
    )


@dataclass(frozen=True)
class _Places:
    """[n] float64 each, in the text's order."""

    ours: Tensor
    """-log p of the token, in nats, by what was executed."""
    theirs: Tensor
    kl: Tensor
    agreed: Tensor
    """1 where both have the same most likely token."""


def cost_of(
    what: Scored, wide: PreTrainedModel, text: RealText, progress: Callable[[str, int, int], object]
) -> PrecisionCost:
    device = wide.device
    least = TOKENS[device.type] if what.places > 1 else min(TOKENS[device.type], ONE_PLACE_TOKENS // what.window)
    inputs, targets = rows(text, what, least)
    at_once = what.batch * max(1, min(PASS_TOKENS // what.window, PASS_PLACES // what.places) // what.batch)
    reference = last_positions(wide, what.places)
    found: list[Tensor] = []
    with torch.no_grad():
        for tokens, wanted in zip(inputs.split(at_once), targets.split(at_once), strict=True):
            tokens, wanted = tokens.to(device), wanted.to(device)
            theirs, ours = reference({"input_ids": tokens}), _in_batches(what, tokens)
            found.append(_compared(theirs, ours, wanted))
            progress("text", sum(each.shape[1] for each in found), targets.numel())
        greedy = _greedy_texts(what, wide, inputs)
    places = _Places(*torch.cat(found, dim=1))
    if not places.theirs.isfinite().all():
        raise RunError("model", "PyTorch's own logits of the unquantised model are not finite on real text")
    increase = _estimate(places.ours - places.theirs)
    return PrecisionCost(
        executed=what.executed,
        reference=f"the unquantised model in {str(wide.dtype).removeprefix('torch.')}",
        text=text.source,
        text_sha256=text.sha256,
        tokens=targets.numel(),
        context=what.window,
        perplexity=_estimate(places.ours),
        reference_perplexity=_estimate(places.theirs),
        increase=Estimate(increase.value - 1, increase.low - 1, increase.high - 1),
        kl=float(places.kl.mean()),
        top1_agreement=float(places.agreed.mean()),
        greedy=greedy,
    )


def rows(text: RealText, what: Scored, least: int) -> tuple[Tensor, Tensor]:
    """Pieces of ``text`` as ``what`` takes them, int64 [n, window], and the tokens that are to be predicted, [n,
    places]: ``least`` of them or more, each once, in the text's order, until the text is over and starts again.

    Where the tokenizer begins a text with a token of its own, each piece begins so.
    """
    count = -(-least // (what.places * what.batch)) * what.batch
    lead = 0 if text.begin is None else 1
    starts = torch.arange(count).unsqueeze(1) * what.places
    own = what.window - lead
    at = (starts + torch.arange(own)) % len(text.tokens)
    behind = (starts + own + 1 - what.places + torch.arange(what.places)) % len(text.tokens)
    pieces = text.tokens[at]
    if text.begin is not None:
        pieces = torch.cat([torch.full((count, 1), text.begin), pieces], dim=1)
    return pieces, text.tokens[behind]


def _in_batches(what: Scored, tokens: Tensor) -> Tensor:
    """[n, places, vocabulary] of ``tokens`` [n, window], n being a multiple of its batch."""
    return torch.cat([what.logits(batch) for batch in tokens.split(what.batch)])


def _compared(theirs: Tensor, ours: Tensor, wanted: Tensor) -> Tensor:
    """[4, n], see :class:`_Places`, on the CPU; logits [rows, places, vocabulary], ``wanted`` [rows, places]."""
    if ours.shape != theirs.shape:
        raise RunError("quality", f"logits of shape {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    found = []
    flat = (each.flatten(0, 1).split(CHUNK) for each in (theirs, ours, wanted.unsqueeze(-1)))
    for reference, logits, token in zip(*flat, strict=True):
        log_p, log_q = reference.log_softmax(-1), logits.to(reference).log_softmax(-1)
        numbers = (
            -log_q.gather(-1, token)[:, 0],
            -log_p.gather(-1, token)[:, 0],
            torch.linalg.vecdot(log_p.exp(), log_p - log_q).clamp(min=0),  # rounding may go below
            reference.argmax(-1) == logits.argmax(-1),
        )
        found.append(torch.stack([number.double() for number in numbers]))
    return torch.cat(found, dim=1).cpu()


def _estimate(logs: Tensor) -> Estimate:
    """exp of the mean of ``logs`` [n], with the interval that the means of :data:`BLOCK` neighbours give."""
    mean = float(logs.mean())
    blocks = logs[: len(logs) // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
    half = NORMAL_95 * float(blocks.std()) / sqrt(len(blocks)) if len(blocks) > 1 else nan
    return Estimate(*(_exp(each) for each in (mean, mean - half, mean + half)))


def _exp(power: float) -> float:
    return exp(power) if power < 700 else inf if power == power else nan  # math.exp raises above 709


def _greedy_texts(what: Scored, wide: PreTrainedModel, inputs: Tensor) -> GreedyTexts:
    """Where greedy continuations of the first pieces part.

    Up to there both texts are the same, so it is the first place at which what is executed, given the reference's text,
    would choose another token: no text of its own is needed.
    """
    kind = wide.device.type
    count = what.batch * -(-TEXTS[kind] // what.batch)
    pieces = inputs[:count].to(wide.device)
    if what.places > 1:
        new = min(NEW_TOKENS[kind], what.places)
        prompts = pieces[:, : what.window - new + 1]
        theirs = _continued(wide, prompts, new)
        ours = _in_batches(what, torch.cat([prompts, theirs[:, :-1]], dim=1))[:, -new:].argmax(-1)
    else:  # one place a pass: both see the window alone, which moves on
        new, texts = NEW_TOKENS[kind] // 4, pieces
        reference = last_positions(wide, 1)
        chosen = []
        for _ in range(new):
            seen = texts[:, -what.window :]
            chosen.append(_in_batches(what, seen).argmax(-1))
            texts = torch.cat([texts, reference({"input_ids": seen}).argmax(-1)], dim=1)
        ours, theirs = torch.cat(chosen, dim=1), texts[:, -new:]
    same = (ours == theirs).long().cumprod(1).sum(1)
    parted = same < new
    first = int(same.min()) if parted.any() else None
    return GreedyTexts(len(same), new, int(parted.sum()), first, float(same.double().mean()))


def _continued(model: PreTrainedModel, tokens: Tensor, new: int) -> Tensor:
    """The ``new`` most likely tokens [rows, new] behind ``tokens`` [rows, length], one after the other."""
    from transformers import DynamicCache

    cache, chosen = DynamicCache(config=model.config), []
    for _ in range(new):
        tokens = model(input_ids=tokens, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        chosen.append(tokens)
    return torch.cat(chosen, dim=1)
