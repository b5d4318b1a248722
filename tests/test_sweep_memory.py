"""Jobs of a sweep that do not fit the card beside each other, and fit it alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from passes.errors import RunError
from pipeline.__main__ import compose_config
from pipeline.config.schema import Config
from pipeline.record.console import StageDisplay
from pipeline.record.record import Record
from pipeline.sweep import isolation, waves
from pipeline.sweep.isolation import Ended
from pipeline.sweep.jobs import Job
from pipeline.sweep.ledger import Entry
from pipeline.sweep.run import Done

ALLOC_FAILED = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


class Tasks:
    """Stands in for :class:`pipeline.sweep.run.Task`: job ``n`` fails as ``beside(n)`` says while others run beside it,
    and well or as ``alone(n)`` says by itself."""

    def __init__(self, beside: Callable[[int], str | None], alone: Callable[[int], str | None]) -> None:
        self.beside, self.alone = beside, alone
        self.rows: list[tuple[int, str | None]] = []
        self.alone_done: list[int] = []

    def attempt(self, config: Config, turns: isolation.Turns) -> Done:
        turns.leave(asked=False)
        return self._done(config, self.beside(config.seed))

    def finish(self, done: Done) -> dict[str, Any]:
        self.rows.append((done.config.seed, None if done.report["failure"] is None else done.report["failure"]["kind"]))
        return done.report

    def do(self, config: Config) -> dict[str, Any]:
        self.alone_done.append(config.seed)
        return self.finish(self._done(config, self.alone(config.seed)))

    def label(self, done: Done) -> str:
        return f"seed={done.config.seed}"

    @staticmethod
    def _done(config: Config, kind: str | None) -> Done:
        failure = None if kind is None else {"stage": "verify", "kind": kind, "message": "no room"}
        return Done(
            config, str(config.seed), Entry("name", 0.0), {"failure": failure}, Ended(1, False, False, 1.0, None)
        )


def jobs(count: int) -> list[Job]:
    return [Job(compose_config([f"seed={seed}"]), str(seed), f"seed={seed}") for seed in range(count)]


def test_what_finds_too_little_memory_beside_others_is_done_again_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = Tasks({1: "out_of_memory", 3: "out_of_memory", 4: "accuracy"}.get, {3: "accuracy"}.get)
    waves.do(tasks, jobs(5), 3)  # type: ignore[arg-type]

    assert tasks.alone_done == [1, 3]
    assert dict(tasks.rows) == {0: None, 1: None, 2: None, 3: "accuracy", 4: "accuracy"}
    assert len(tasks.rows) == 5  # each job has one row, and its last
    assert "seed=1: too little memory beside the others; again by itself" in capsys.readouterr().err


def test_what_an_interruption_leaves_to_be_done_again_has_its_row() -> None:
    def interrupted(seed: int) -> str | None:
        raise KeyboardInterrupt

    tasks = Tasks({0: "out_of_memory", 2: "out_of_memory"}.get, interrupted)
    with pytest.raises(KeyboardInterrupt):
        waves.do(tasks, jobs(3), 3)  # type: ignore[arg-type]
    assert len(tasks.alone_done) == 1
    left = ({0, 2} - set(tasks.alone_done)).pop()
    assert dict(tasks.rows) == {1: None, left: "out_of_memory"}


def test_a_job_that_was_alone_already_is_not_done_again() -> None:
    tasks = Tasks({2: "out_of_memory"}.get, {}.get)
    waves.do(tasks, jobs(3), 2)  # type: ignore[arg-type]
    assert tasks.alone_done == [] and dict(tasks.rows)[2] == "out_of_memory"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError(ALLOC_FAILED), "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "RuntimeError"),
        (MemoryError("no"), "out_of_memory"),
        (RunError("deserialize", "no"), "deserialize"),
    ],
)
def test_memory_that_had_run_out_is_told_from_other_errors(error: Exception, kind: str, tmp_path: Path) -> None:
    record = Record(compose_config([f"output={tmp_path}"]), StageDisplay())
    record.fail(error)
    assert record.report.failure is not None and record.report.failure.kind == kind
