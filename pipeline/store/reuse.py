"""Between a run and the engine store: a run finds its engine there, or leaves it there once it is verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from passes.errors import RunError
from pipeline.config.choices import STAGES
from pipeline.config.verification import VerifyConfig
from pipeline.engine.sections import Engines
from pipeline.host.plain_json import from_json, to_json
from pipeline.model.real_text import RealText
from pipeline.record.sections import StoreLookup
from pipeline.store.entries import Damaged, Store
from pipeline.store.key import engine_key
from pipeline.verify.sections import Quality, Verification

BUILD_STAGES = STAGES[STAGES.index("export") : STAGES.index("build") + 1]

Say = Callable[[str], None]


def judged_as(asked: VerifyConfig, seed: int, text: RealText | str | None = None) -> dict[str, Any]:
    """What decides the inputs that a verification is made on, beside its code, which is in the key.  ``text``: on which
    quality is measured, see :func:`pipeline.verify.quality.text_for`; its limit counts too."""
    found: dict[str, Any] = {"lengths": asked.lengths, "samples": asked.samples, "seed": seed, "quality": None}
    if text is not None:
        what = text if isinstance(text, str) else text.sha256
        found["quality"] = {"text": what, "max_perplexity_increase": asked.max_perplexity_increase}
    return found


@dataclass(frozen=True)
class Kept:
    """What the store keeps beside the files of an engine: what its build and its verification found."""

    engines: Engines
    verification: Verification
    judged_as: dict[str, Any]
    """On which inputs, see :func:`judged_as`."""
    stages_s: dict[str, float]
    """Seconds of each stage of that run."""
    quality: Quality | None = None
    built: str = ""
    """When."""


class Place:
    """Where the store keeps, or would keep, the engine of one run; without a store there is none."""

    def __init__(self, folder: Path, store: Store | None = None, decided_by: dict[str, Any] | None = None) -> None:
        self.kept: Kept | None = None
        """Of the stored engine, whose files are in the run's ``folder``; None: it has to be built."""
        self.key = engine_key(decided_by) if decided_by else ""
        self.seconds = 0.0
        """How long it took to bring it there."""
        self._folder, self._store, self._decided_by = folder, store, decided_by or {}
        self._before = _files(folder)

    @property
    def runtime_cache(self) -> Path | None:
        """File of the kernels that TensorRT-RTX compiles for this engine, see :mod:`pipeline.engine.kernel_cache`."""
        return None if self._store is None else self._store.entry(self.key) / "runtime.cache"

    @property
    def timing_cache(self) -> Path | None:
        """File of what TensorRT's builder measured on this GPU, whatever the engine; TensorRT-RTX measures nothing."""
        if self._store is None or self._decided_by["versions"]["flavour"] != "tensorrt":
            return None
        measured_on = {key: self._decided_by[key] for key in ("versions", "target")}
        return self._store.root / f"timing-{engine_key(measured_on)[:16]}.cache"

    @property
    def fused_kernels(self) -> Path | None:
        """File of the forms of attention that this TensorRT has fused kernels for on this GPU, found out by this code;
        see :func:`pipeline.engine.kernel_cache.fused_kernels`."""
        if self._store is None:
            return None
        found_by = {key: self._decided_by[key] for key in ("versions", "target", "code")}
        return self._store.root / f"fused-{engine_key(found_by)[:16]}.json"

    def lookup(self, verified: bool = False) -> StoreLookup | None:
        """What the look into the store came to; None without one.  ``verified``: the verification is the stored one's
        too."""
        stages = (*BUILD_STAGES, "verify") if verified else BUILD_STAGES
        if self._store is None:
            return None
        if self.kept is None:
            return StoreLookup(self.key, False, dict.fromkeys(stages, "miss"))
        seconds = {stage: self.kept.stages_s[stage] for stage in stages}
        return StoreLookup(self.key, True, dict.fromkeys(stages, "hit"), self.kept.built, seconds)

    def restore(self, wanted: dict[str, Any] | None, say: Say) -> None:
        """Bring the stored engine into the run's folder; a damaged entry is removed, which is said.

        ``wanted``: what its verification must have been :func:`judged_as`, where that is taken over; None: it is not.
        """
        assert self._store is not None
        started = time.perf_counter()
        try:
            content = self._store.content(self.key)
            if content is None or (wanted is not None and not _covers(content["judged_as"], wanted)):
                return
            self._store.restore(self.key, content["files"], self._folder)
        except Damaged as damage:
            self._store.remove(self.key)
            say(f"store: entry {self.key[:12]} is damaged ({damage}), was removed and is built again")
            return
        self.kept = from_json(Kept, {each.name: content[each.name] for each in fields(Kept)})
        self.seconds = time.perf_counter() - started

    def keep(self, kept: Kept, say: Say) -> None:
        """Store the engine of this run, which has passed its verification (without a GPU its graph has, and the stored
        verdict says so); says where that cannot be done."""
        if self._store is None or self.kept is not None:
            return
        kept = replace(kept, built=datetime.now().astimezone().isoformat(timespec="seconds"))
        content = {"decided_by": self._decided_by, **to_json(kept)}
        try:
            self._store.commit(self.key, sorted(_files(self._folder) - self._before), content)
        except OSError as error:  # the run has its engine all the same
            say(f"store: the engine was not kept ({error.strerror or error})")


@contextmanager
def engine_of(
    folder: Path,
    store: Store | None,
    decided_by: dict[str, Any],
    wanted: dict[str, Any] | None,
    note: Say,
    waiting: Say,
) -> Iterator[Place]:
    """The place of the engine that a run in ``folder`` needs, no other process building it while the block runs.

    ``decided_by``: :func:`pipeline.store.key.ingredients`; ``wanted``: see :meth:`Place.restore`; ``note`` is told what
    the reader of the report must know, and ``waiting`` that another process has the engine in hand.  An engine that was
    restored and then failed in the block (verification, deserialisation) leaves the store.
    """
    if store is None:
        yield Place(folder)
        return
    place = Place(folder, store, decided_by)
    with store.locked(place.key, waiting):
        place.restore(wanted, note)
        try:
            yield place
        except RunError as error:
            if place.kept is not None and error.kind in ("accuracy", "deserialize"):
                store.remove(place.key)
                note(f"store: the engine {place.key[:12]} failed and was removed; the next run builds it anew")
            raise


def _covers(judged_as: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether that verification is the one that is ``wanted``; it may have measured quality beside it."""
    return wanted in (judged_as, {**judged_as, "quality": None})


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.iterdir() if path.is_file()}
