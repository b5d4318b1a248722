"""Whole runs for tests, and what they left behind."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from reports import conforms
from rich.console import Console

from pipeline.__main__ import compose_config
from pipeline.record.console import StageDisplay
from pipeline.run import Outcome, run

GPU = torch.cuda.is_available()
DONE = "ok" if GPU else "not_executed"
APART = ["store.enabled=false"]  # from the user's engines, and from those of other tests
SMALL = ["shape.max=64", "shape.exact=[]", "benchmark=none"]
"""One range of lengths and no exact one, which costs a build as much again."""


def do(store: str, output: Path, model: Path, *overrides: str, display: StageDisplay | None = None) -> Outcome:
    settings = ["model=local", f"model.path={model}", f"tracking.uri={store}", f"output={output}", *APART, *overrides]
    outcome = run(compose_config(settings), display or StageDisplay(Console(file=io.StringIO())))
    conforms(outcome.folder)
    return outcome


def mlflow_run(store: str, outcome: Outcome) -> Any:
    """The one MLflow run of ``outcome``."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.run_folder = '{outcome.folder.resolve()}'")
    assert len(found) == 1
    return found[0]


def artifacts(store: str, run_id: str) -> set[str]:
    from mlflow import MlflowClient

    return {item.path for item in MlflowClient(store).list_artifacts(run_id)}


def failure(outcome: Outcome) -> tuple[str, str]:
    assert outcome.report["status"] == "failed"
    return outcome.report["failure"]["stage"], outcome.report["failure"]["kind"]


def outcome_in(output: Path) -> Outcome:
    """What the only run under ``output`` left."""
    (folder,) = output.glob("*/*")
    return Outcome(conforms(folder), folder)
