"""``tracking.register=true``: each model of a sweep in MLflow's model registry, its best engines under aliases."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from passes.errors import message_line
from pipeline.record.report import ENGINE, verified_by
from pipeline.sweep.jobs import Row, at, headline
from pipeline.sweep.tracking import Parent
from pipeline.tracking.runs import ENGINE_FILE
from pipeline.tracking.store import check_store, open_client, quiet, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)


def best(rows: Mapping[str, Row], reports: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Model -> alias -> run: the ``fastest`` engine by what was timed of it and the ``smallest``, of those that
    were executed and passed verification; without a GPU there is none."""
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for key, report in reports.items():
        run_id, size, path = rows[key].run_id, at(report, "engine.bytes"), headline(report)
        if run_id is None or size is None or report["status"] == "failed" or verified_by(report) != ENGINE:
            continue
        aliases = found.setdefault(re.sub(r"[^\w.\- ]", "_", report["model"]["name"]), {})  # what MLflow takes
        numbers = {"smallest": float(size)} | ({} if path is None else {"fastest": float(at(report, path))})
        for alias, number in numbers.items():
            aliases[alias] = min(aliases.get(alias, (number, run_id)), (number, run_id))
    return {model: {alias: run_id for alias, (_, run_id) in aliases.items()} for model, aliases in found.items()}


def register(parent: Parent, rows: Mapping[str, Row], reports: Mapping[str, dict[str, Any]]) -> None:
    """Enter a version for each of the :func:`best` runs, once, and point the aliases at them."""
    try:
        check_store(parent.uri, must_exist=True)
        with quiet():
            client = open_client(parent.uri)
            for model, aliases in best(rows, reports).items():
                _create(client, model)
                for alias, run_id in aliases.items():
                    client.set_registered_model_alias(model, alias, _version(client, model, run_id))
    except store_errors() as error:
        _log.warning(f"the model registry could not be written ({message_line(error)}); the same command tries again")


def _create(client: MlflowClient, model: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version(client: MlflowClient, model: str, run_id: str) -> str:
    for version in client.search_model_versions(f"name='{model}'"):
        if version.run_id == run_id:
            return str(version.version)
    run = client.get_run(run_id)
    source = f"{run.info.artifact_uri}/{ENGINE_FILE}"
    made = client.create_model_version(model, source, run_id, description=run.info.run_name)
    return str(made.version)
