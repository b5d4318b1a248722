"""The engines in folders of runs, in a local MLflow store and in the engine store.

Each is counted once, however many names it has (:func:`pipeline.host.files.share`), and where they are to be fewer the
least recently used goes, under all of its names: removing one alone frees nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.host.files import locked
from pipeline.record.unfinished import STATE
from pipeline.store.entries import CONTENT, PARTIAL

SUFFIXES = (".trt", ".pt2")
"""Of what is large; reports, manifests and models, which name their engines by hash, stay."""


@dataclass
class Kept:
    """What one build left, and every folder that has it."""

    folders: list[Path] = field(default_factory=list)
    files: dict[tuple[int, int], int] = field(default_factory=dict)
    """Device and inode -> bytes."""
    used: float = 0.0
    """When it was last built or taken from the store, in seconds since the epoch."""

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def found(roots: Iterable[Path]) -> list[Kept]:
    """What is kept below ``roots``, the least recently used first; what a run has not finished with is none of it."""
    every: list[Kept] = []
    for folder, names in _folders(roots):
        here = Kept([folder])
        for name in names:
            with suppress(FileNotFoundError):
                status = (folder / name).stat()
                if name == CONTENT or name.endswith(SUFFIXES):
                    here.used = max(here.used, status.st_mtime)
                if name.endswith(SUFFIXES):
                    here.files[status.st_dev, status.st_ino] = status.st_size
        if not here.files:
            continue
        for same in [each for each in every if each.files.keys() & here.files.keys()]:
            every.remove(same)
            here = Kept(same.folders + here.folders, same.files | here.files, max(same.used, here.used))
        every.append(here)
    return sorted(every, key=lambda each: each.used)


def _folders(roots: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    for root in dict.fromkeys(path.resolve() for path in roots):
        for parent, _, names in os.walk(root):
            if STATE not in names and not parent.endswith(PARTIAL):
                yield Path(parent), names


def excess(kept: Iterable[Kept], limit_bytes: float, needed: Iterable[Path]) -> list[Kept]:
    """Those that have to go for the rest to be within ``limit_bytes``; what is in one of the folders ``needed``
    stays."""
    kept, stay = list(kept), {path.resolve() for path in needed}
    over, go = sum(each.bytes for each in kept) - limit_bytes, []
    for each in kept:
        if over > 0 and not stay & set(each.folders):
            go.append(each)
            over -= each.bytes
    return go


def remove(kept: Kept) -> None:
    """Remove its files in every folder; an entry of the engine store that another process holds stays."""
    for folder in kept.folders:
        if not (folder / CONTENT).is_file():
            for path in folder.iterdir():
                if path.suffix in SUFFIXES:
                    path.unlink(missing_ok=True)
            continue  # else it is an entry of the engine store, and goes whole: what is left of one is damaged
        with suppress(TimeoutError), locked(folder.with_suffix(".lock"), timeout_s=0):
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            folder.rmdir()
