"""Whose turn it is on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

Turn = Callable[[], AbstractContextManager[Collection[int]]]
"""Entered to have the GPU to itself; gives the ids of the processes that lie on it and launch nothing meanwhile."""


def alone() -> AbstractContextManager[Collection[int]]:
    """The turn of a run that shares the GPU with nobody."""
    return nullcontext(())
