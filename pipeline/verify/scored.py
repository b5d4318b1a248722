"""What gives the logits at many places of a text: whatever a run executes, in the form in which it executes it.

An engine that answers with the logits of every position gives a window of them in one pass, a generation with a cache
one in each decode step, and an engine that answers with those of the last position alone one in each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.config.schema import ModelConfig, ShapeConfig, StrategyConfig
from pipeline.engine import programs
from pipeline.model.load import LoadedModel
from pipeline.trace.call_form import make_inputs
from pipeline.verify.arithmetic import Forward, in_arithmetic, on_cpu
from pipeline.verify.tokens import last_positions

if TYPE_CHECKING:
    from pipeline.verify.candidate import Machine

WINDOW = 512
"""Tokens that are looked at together, where the profile has room for as many."""
PROMPT = 128
"""Of them the prompt, where the others run through a cache."""
ONE_PLACE_WINDOW = 64
"""The same where a whole pass gives one place alone."""
ONE_PLACE_TOKENS = 2_560_000
"""Tokens that pass through the model then, at most: with a window of 64 those of 40,000 places; an engine of 2048
tokens alone has 1250 places looked at."""


@dataclass(frozen=True)
class Scored:
    """Gives the logits at the last ``places`` of ``window`` tokens."""

    executed: str
    """As :attr:`pipeline.verify.candidate.Machine.executed`."""
    logits: Callable[[Tensor], Tensor]
    """[batch, window] int64 -> [batch, places, vocabulary]."""
    batch: int
    window: int
    places: int


def scored(what: Machine, loaded: LoadedModel, form: ModelConfig, strategy: StrategyConfig, precision: str) -> Scored:
    """What ``what`` gives.  A rival's logits are those of eager PyTorch in its precision.  Where a graph gives those of
    the last position alone it is made once more, by the same strategy, for all of them: step by step a CPU would take
    minutes for what takes seconds."""
    shape = what.shape
    every, inputs = form.logits == "all" and what.forced is None, form.inputs
    forward = what.forward
    if what.executed == "graph" and not every:
        forward, inputs, every = _whole_graph(loaded, form, shape, strategy, precision), _without_last(form), True
    elif what.executed not in ("engine", "graph"):
        forward, inputs, every = last_positions(loaded.model, 0), ["input_ids"], True
    if what.forced is not None and not every:
        return _through_cache(what, shape)
    window = min(max(WINDOW if every else ONE_PLACE_WINDOW, shape.min), shape.max)
    places = window if every else 1
    return Scored(what.executed, lambda tokens: forward(make_inputs(inputs, tokens)), shape.batch, window, places)


def _through_cache(what: Machine, shape: ShapeConfig) -> Scored:
    forced = what.forced
    assert forced is not None
    prompt = min(max(PROMPT, shape.min), shape.max)
    window = min(max(WINDOW, prompt + WINDOW - PROMPT), what.longest)
    decoded = window - prompt
    return Scored(what.executed, lambda tokens: forced(tokens, None, decoded), shape.batch, window, decoded + 1)


def _without_last(form: ModelConfig) -> list[str]:
    return [name for name in form.inputs if name != "last"]


def _whole_graph(
    loaded: LoadedModel, form: ModelConfig, shape: ShapeConfig, strategy: StrategyConfig, precision: str
) -> Forward:
    """The model's graph after ``strategy``, with the logits of every position, in ``precision``'s arithmetic."""
    whole = replace(form, logits="all", inputs=_without_last(form))
    trace = programs.parts(loaded.model, whole, shape, None, loaded.quantised)["engine"]
    module = programs.rewritten(trace(), strategy).program.module()
    return in_arithmetic(lambda inputs: module(**inputs), on_cpu(precision))
