"""What is asked of a decode step's program before anything is built from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from passes.proof.claims import ancestors
from pipeline.trace.cache_layers import by_name, caches
from pipeline.trace.cache_shape import CacheShape

ALLOWED = 0.05
"""Relative error of logits behind three tokens: far above any rounding, and far below one key too many."""


def is_the_model(program: ExportedProgram, model: nn.Module, cache: CacheShape, device: torch.device) -> bool:
    """Whether three tokens, one by one through the step's ``program``, come to what ``model`` makes of them together.

    For attention that is written out: no mask of it is proved, and its own code may have made one for a cache that
    grows (GPT-Neo); and for a model that was told that its cache is full.  What is built is verified later all the
    same."""
    try:
        return _agrees(program, model, cache, device)
    except (IndexError, RuntimeError) as error:  # of what the program comes upon; memory is another matter
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False


def _agrees(program: ExportedProgram, model: nn.Module, cache: CacheShape, device: torch.device) -> bool:
    step, given, batch = program.module(), caches(cache, device), cache.batch
    tokens = torch.arange(1, 4, device=device).expand(batch, -1)
    with torch.no_grad():
        for place in range(tokens.shape[1]):
            position = torch.full((batch,), place, device=device)
            logits, *made = step(input_ids=tokens[:, place : place + 1], position=position, **given)
            given = by_name(cache, made)
        expected: Any = model(input_ids=tokens, use_cache=False).logits[:, -1:].float()
    return bool((logits.float() - expected).norm() <= expected.norm() * ALLOWED)


def reads_first_row(program: ExportedProgram) -> bool:
    """Whether a result is computed from ``position[0]`` alone."""
    (position,) = (node for node in program.graph.find_nodes(op="placeholder") if node.name == "position")
    read = ancestors(list(program.graph.find_nodes(op="output")))
    return any(user.target is torch.ops.aten.select.int and user.name in read for user in position.users)
