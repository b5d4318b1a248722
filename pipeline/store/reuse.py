"""Between a run and the engine store: a run finds its engine there, or leaves it there once it is verified."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import RunError
from pipeline.config.schema import STAGES, Config
from pipeline.record.record import Record, StopHere
from pipeline.record.report import finite
from pipeline.store.entries import Damaged, Store
from pipeline.store.key import engine_key, ingredients

if TYPE_CHECKING:
    import torch

    from passes.tensorrt.versions import Stack
    from pipeline.model.load import LoadedModel

BUILD_STAGES = STAGES[STAGES.index("export") : STAGES.index("build") + 1]
SECTIONS = ("attention", "engine")  # of the report: what those stages found


def applies(config: Config) -> bool:
    """Whether a run of ``config`` looks into the store: it does where it goes as far as an engine."""
    return config.store.enabled and config.backend.name == "tensorrt" and config.reaches("build")


@contextmanager
def engine_of(record: Record, loaded: LoadedModel, device: torch.device, stack: Stack) -> Iterator[Place]:
    """The place of this run's engine, no other process building it while the block runs.

    An engine that was restored and then failed in the block (verification, deserialisation) leaves the store.
    """
    if not applies(record.config):
        yield Place(record)
        return
    store = Store.of(record.config.store)
    place = Place(record, store, ingredients(record.config, loaded, stack, device), executes=device.type == "cuda")
    with store.locked(place.key, record.display.note):
        place.restore()
        try:
            yield place
        except RunError as error:
            if place.restored and error.kind in ("accuracy", "deserialize"):
                store.remove(place.key)
                record.note(f"store: the engine {place.key[:12]} failed and was removed; the next run builds it anew")
            raise


class Place:
    """Where the store keeps, or would keep, the engine of one run."""

    def __init__(
        self,
        record: Record,
        store: Store | None = None,
        decided_by: dict[str, Any] | None = None,
        executes: bool = False,
    ) -> None:
        self.restored = False
        """Whether the run folder holds the stored engine, and the report what its build found."""
        self.key = engine_key(decided_by) if decided_by else ""
        self._record = record
        self._store = store
        self._decided_by = decided_by or {}
        self._executes = executes
        """Whether this machine runs engines: then a stored one is verified again, whatever was asked for before."""
        self._verification: dict[str, Any] = {}
        self._verify_s = 0.0
        self._before = _files(record)
        self._notes = 0

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

    def restore(self) -> None:
        """Bring the stored engine into the run folder; a damaged entry is removed, with a note."""
        assert self._store is not None
        started, record, content = time.perf_counter(), self._record, None
        assert record.folder is not None
        try:
            content = self._store.content(self.key)
            if content is not None and self._answers(content):
                self._store.restore(self.key, content["files"], record.folder)
                self.restored = True
        except Damaged as damage:
            self._store.remove(self.key)
            record.note(f"store: entry {self.key[:12]} is damaged ({damage}), was removed and is built again")
        word = "hit" if self.restored else "miss"
        record.report["store"] = {"key": self.key, "hit": self.restored, "stages": dict.fromkeys(BUILD_STAGES, word)}
        if not self.restored:
            self._notes = len(record.report["notes"])  # what is said from here on is about the engine
            return
        assert content is not None
        record.report["store"] |= {"built": content["built"], "stages_s": content["stages_s"]}
        record.report.update(content["report"])
        for note in content["notes"]:
            record.note(note)
        self._verification, self._verify_s = content["verify"], content["verify_s"]
        record.display.done("store", time.perf_counter() - started, f"hit {self.key[:12]}, built {content['built']}")

    def take_over_verification(self) -> None:
        """Without a GPU: what the rewritten graph of the stored engine was judged to be, marked as stored."""
        if not self._record.config.reaches("verify"):
            raise StopHere
        self._record.report["verify"] = {**self._verification, "stored": True}
        store = self._record.report["store"]
        store["stages"]["verify"], store["stages_s"]["verify"] = "hit", self._verify_s

    def keep(self) -> None:
        """Store the engine of this run, which has passed its verification."""
        if self._store is None or self.restored:
            return
        report = self._record.report
        content = {
            "decided_by": self._decided_by,
            "built": datetime.now().astimezone().isoformat(timespec="seconds"),
            "report": {section: report[section] for section in SECTIONS},
            "notes": report["notes"][self._notes :],
            "stages_s": {stage: report["stages_s"][stage] for stage in BUILD_STAGES},
            "verify": report["verify"],
            "verify_s": report["stages_s"]["verify"],
            "judged_as": _judged_as(self._record.config),
        }
        try:
            self._store.commit(self.key, sorted(_files(self._record) - self._before), finite(content))
        except OSError as error:  # the run has its engine all the same
            self._record.note(f"store: the engine was not kept ({error.strerror or error})")

    def _answers(self, content: dict[str, Any]) -> bool:
        """Where the engine cannot run, its stored verification has to be the one that this run asks for."""
        config = self._record.config
        return self._executes or not config.reaches("verify") or content["judged_as"] == _judged_as(config)


def _judged_as(config: Config) -> dict[str, Any]:
    """What decides the inputs that a verification is made on, beside its code, which is in the key."""
    return {"verify": asdict(config.verify), "seed": config.seed}


def _files(record: Record) -> set[Path]:
    assert record.folder is not None
    return {path for path in record.folder.iterdir() if path.is_file()}
