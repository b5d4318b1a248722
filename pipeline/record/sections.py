"""The whole report as a value: every section typed, each where the stage that measures it can hand it over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config.schema import Config
from pipeline.engine.sections import Attention, DecodeProgram, Engine, Export
from pipeline.measure.sections import Benchmark
from pipeline.model.sections import Model
from pipeline.record.environment import Environment
from pipeline.record.report import SCHEMA
from pipeline.verify.sections import Quality, Verification

Status = Literal["ok", "failed", "not_executed", "unavailable"]


@dataclass(frozen=True)
class Failure:
    """Why the run failed."""

    stage: str
    """In which stage; ``record`` where the report itself could not be written."""
    kind: str
    """A short name: ``accuracy``, ``out_of_memory``, ``interrupted``, or the class of an error that is none of ours."""
    message: str
    """One line."""
    traceback: str | None = None
    """Of an error that is none of ours."""


@dataclass(frozen=True)
class StoreLookup:
    """What the look into the engine store came to."""

    key: str
    """Content key of the engine."""
    hit: bool
    stages: dict[str, Literal["hit", "miss"]]
    """Which stages the store stood in for."""
    built: str | None = None
    """When the stored engine was built."""
    stages_s: dict[str, float] = field(default_factory=dict)
    """Seconds that those stages took then."""


@dataclass(frozen=True)
class MlflowRun:
    """The run in MLflow: enough to find it again."""

    uri: str
    experiment_id: str
    run_id: str


@dataclass(frozen=True)
class Report:
    """What a run did and measured.  A section is null until its stage has something to say."""

    schema: int
    status: Status
    """``not_executed``: no GPU could run the engine, so nothing was timed.  ``unavailable``: the backend cannot run
    here."""
    failure: Failure | None
    unavailable: str | None
    """Why the backend cannot run here."""
    config: dict[str, Any]
    """Every setting."""
    environment: Environment | None
    model: Model | None
    attention: Attention | None
    engine: Engine | None
    decode: DecodeProgram | None
    """With a KV cache ``attention`` and ``engine`` are the prompts'; here are those of the tokens after them."""
    verify: Verification | None
    quality: Quality | None
    export: Export | None
    benchmark: Benchmark | None
    store: StoreLookup | None
    stages_s: dict[str, float]
    """Seconds of each stage that was begun."""
    notes: tuple[str, ...]
    """What the reader must know."""
    mlflow: MlflowRun | None
    sha256: str | None
    """Of everything else here, as JSON with its keys in order."""


def new_report(config: Config) -> Report:
    """An empty report of ``config``: nothing has been done yet, and status is ``failed`` until something was."""
    return Report(
        schema=SCHEMA,
        status="failed",
        failure=None,
        unavailable=None,
        config=config.to_dict(),
        environment=None,
        model=None,
        attention=None,
        engine=None,
        decode=None,
        verify=None,
        quality=None,
        export=None,
        benchmark=None,
        store=None,
        stages_s={},
        notes=(),
        mlflow=None,
        sha256=None,
    )
