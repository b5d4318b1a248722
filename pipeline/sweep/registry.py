"""``tracking.register=true``: each model of a sweep in MLflow's model registry, its best engines under aliases."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.errors import message_line
from pipeline.record.report import ENGINE, engine_bytes, verified_by
from pipeline.sweep.jobs import Row, at, headline
from pipeline.sweep.tracking import Parent
from pipeline.tracking.names import plain_metrics
from pipeline.tracking.runs import ENGINE_FILE, MODEL
from pipeline.tracking.store import check_store, open_client, quiet, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

WON = {
    "fastest": "the least time on the device",
    "smallest": "the smallest engine file (both files with a KV cache)",
    "best_quality": "the least rise of perplexity over the unquantised model's on real text; where no engine of the "
    "model has that measured, the least relative error of the verification",
}
"""Alias -> what a version won it by."""

QUALITY = ("perplexity_increase", "relative_error")
"""By what ``best_quality`` is won: the first, of the engines that have it; the second, where none of a model does."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """An engine that was executed and passed its verification."""

    run_id: str
    numbers: dict[str, float]
    """Alias -> what is least for the one that has it."""
    tags: dict[str, str]
    """What a version of the registry says of it."""


def best(rows: Mapping[str, Row], reports: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Candidate]]:
    """Model -> alias (see :data:`WON`) -> engine, of those that were executed and passed verification; without a GPU
    there is none.  ``best_quality`` only where precisions differ."""
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for key, report in reports.items():
        if rows[key].run_id is None or engine_bytes(report) is None:
            continue
        if report["status"] != "failed" and verified_by(report) == ENGINE:
            model = re.sub(r"[^\w.\- ]", "_", report["model"]["name"])  # what MLflow takes
            models.setdefault(model, {})[str(rows[key].run_id)] = report
    chosen = {}
    for model, runs in models.items():
        several = len({report["config"]["precision"] for report in runs.values()}) > 1
        judged = any(QUALITY[0] in plain_metrics(report) for report in runs.values())
        engines = [_candidate(run_id, report, QUALITY[0 if judged else 1]) for run_id, report in runs.items()]
        aliases = [alias for alias in WON if alias != "best_quality" or several]
        timed = {alias: [each for each in engines if alias in each.numbers] for alias in aliases}
        chosen[model] = {
            alias: min(those, key=lambda each: (each.numbers[alias], each.run_id))
            for alias, those in timed.items()
            if those
        }
    return chosen


def _candidate(run_id: str, report: dict[str, Any], quality: str) -> Candidate:
    """``quality``: which of the :data:`QUALITY` counts."""
    path = headline(report)
    found = {
        "fastest": None if path is None else at(report, path),
        "smallest": engine_bytes(report),
        "best_quality": plain_metrics(report).get(quality),
    }
    numbers = {alias: float(number) for alias, number in found.items() if number is not None}
    return Candidate(run_id, numbers, _tags(report))


def _tags(report: dict[str, Any]) -> dict[str, str]:
    config, environment = report["config"], report.get("environment") or {}
    named = {
        "strategy": config["strategy"]["name"], "precision": config["precision"],
        "cache": (config.get("cache") or {}).get("name"), "gpu": environment.get("gpu"),
        "tensorrt": environment.get("tensorrt"), "engine.verified": verified_by(report),
    }  # fmt: skip
    numbers = {name: f"{number:.6g}" for name, number in plain_metrics(report).items()}
    return {name: str(value) for name, value in named.items() if value is not None} | numbers


def register(parent: Parent, rows: Mapping[str, Row], reports: Mapping[str, dict[str, Any]]) -> None:
    """Enter a version for each of the :func:`best` engines, once, and point the aliases at them."""
    try:
        check_store(parent.uri, must_exist=True)
        with quiet():
            client = open_client(parent.uri)
            for model, aliases in best(rows, reports).items():
                _create(client, model)
                known = {each.source: str(each.version) for each in client.search_model_versions(f"name='{model}'")}
                for alias, engine in aliases.items():
                    run = client.get_run(engine.run_id)
                    if (place := source(client, run)) not in known:
                        known[place] = _version(client, model, engine, run, place)
                    version = known[place]
                    client.set_model_version_tag(model, version, f"won.{alias}", f"{engine.numbers[alias]:.6g}")
                    client.set_registered_model_alias(model, alias, version)
    except store_errors() as error:
        _log.warning(f"the model registry could not be written ({message_line(error)}); the same command tries again")


def _create(client: MlflowClient, model: str) -> None:
    from mlflow.exceptions import MlflowException

    won = "".join(f"- `{alias}`: {what}\n" for alias, what in WON.items())
    description = (
        f"TensorRT engines of {model}. Each version is the engine of one run; it was executed on the GPU that its tags "
        f"name and passed its verification there. The aliases are those of the latest sweep:\n\n{won}\n"
        "A version's tags have its numbers, `won.ALIAS` the one that it won by (ms, bytes, a rise of perplexity as a "
        "share, or relative error).\n\n"
        f"A version answers chat messages, by `mlflow.pyfunc.load_model('models:/{model}@ALIAS')` and by "
        f"`python -m pipeline.chat models:/{model}@ALIAS`, on a GPU of the kind that its tags name."
    )
    try:
        client.create_registered_model(model, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_registered_model(model, description)


def _version(client: MlflowClient, model: str, engine: Candidate, run: Run, place: str) -> str:
    tags = engine.tags
    numbers = {"ms_per_token": "{} ms a token", "ms_prompt": "{} ms a prompt", "engine_mb": "{} MB",
               "perplexity": "perplexity {}", "relative_error": "relative error {}"}  # fmt: skip
    said = ", ".join(text.format(tags[name]) for name, text in numbers.items() if name in tags)
    description = (
        f"{run.info.run_name}: {tags['strategy']}, {tags['precision']}, on {tags.get('gpu', 'a GPU')}; {said}."
    )
    made = client.create_model_version(model, place, engine.run_id, tags=tags, description=description)
    return str(made.version)


def source(client: MlflowClient, run: Run) -> str:
    """What a version points at: the run's model that answers, or the engine alone where it left none."""
    if MODEL in {item.path for item in client.list_artifacts(run.info.run_id)}:
        return f"runs:/{run.info.run_id}/{MODEL}"
    return f"{run.info.artifact_uri}/{ENGINE_FILE}"
