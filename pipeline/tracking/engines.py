"""A verified engine back out of MLflow."""

from __future__ import annotations

from pipeline.engine.runner import Engine, open_engine
from pipeline.generate.with_cache import CachedGenerator
from pipeline.tracking.fetch import fetch_engine
from pipeline.verify.candidate import open_generator


def load_engine(run_id: str, uri: str = "sqlite:///mlflow.db", graph_suffices: bool = False) -> Engine:
    """The verified engine of an MLflow run, its hash checked before anything else looks at it.  ``graph_suffices``: see
    :func:`pipeline.tracking.fetch.fetch_engine`."""
    return open_engine(fetch_engine(run_id, uri, graph_suffices=graph_suffices))


def load_generator(run_id: str, uri: str = "sqlite:///mlflow.db", graph_suffices: bool = False) -> CachedGenerator:
    """The two verified engines of an MLflow run with a KV cache, in the same way."""
    return open_generator(fetch_engine(run_id, uri, graph_suffices=graph_suffices).parent)
