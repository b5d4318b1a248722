"""Runs a list of passes: numbers, times, logs and checks them, and leaves out what is asked to be."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.fx import GraphModule

from passes.graph.records import PassRecord

Work = TypeVar("Work")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass(Generic[Work]):
    """One change of a graph, in place."""

    name: str
    run: Callable[[Work], int]
    """Returns how many calls or operations it changed."""
    optional: bool = False
    """Whether what is made without it is as right, and ``strategy.without`` may name it."""


def run(
    passes: tuple[Pass[Work], ...],
    work: Work,
    graph_of: Callable[[Work], GraphModule],
    without: Collection[str] = (),
) -> list[PassRecord]:
    """Every pass but those named by ``without``, one after another, with the graph checked behind each."""
    done: list[PassRecord] = []
    for number, each in enumerate(passes, 1):
        if each.optional and each.name in without:
            continue
        started = time.perf_counter()
        changed = each.run(work)
        graph_of(work).graph.lint()
        done.append(PassRecord(each.name, changed, round(time.perf_counter() - started, 4)))
        _log.debug("%d of %d, %s: %d changed, %.4f s", number, len(passes), each.name, changed, done[-1].seconds)
    graph_of(work).recompile()
    return done


def optional(passes: tuple[Pass[Work], ...]) -> tuple[str, ...]:
    """Those that may be left out."""
    return tuple(each.name for each in passes if each.optional)
