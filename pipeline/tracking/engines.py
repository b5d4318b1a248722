"""A verified engine back out of MLflow."""

from __future__ import annotations

from pipeline.engine.runner import Engine, open_engine
from pipeline.tracking.runs import fetch_engine


def load_engine(run_id: str, uri: str = "sqlite:///mlflow.db") -> Engine:
    """The verified engine of an MLflow run, its hash checked before anything else looks at it."""
    return open_engine(fetch_engine(run_id, uri))
