"""The names under which a run's settings and results stand in MLflow: the report's own, dotted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.record.report import engine_bytes, relative_error, times_count, verified_by
from pipeline.tracking.store import redacted

if TYPE_CHECKING:
    from pipeline.config.schema import Config

NO_METRICS = ("schema", "status", "failure", "config", "environment")  # of report.json: tags and parameters

PLAIN = ("fp16", "dynamic 2..2048")
"""Parts of a name that say no more than what is done where nothing else is asked for: conf/config.yaml."""
FIRST = ("row", "strategy", "backend")
SPEAKS = (*FIRST, "model", "precision", "cache", "shape", "benchmark", "experiment")
"""Settings whose values need no name before them."""


def run_name(config: Config) -> str:
    """What a person calls the run, such as ``detect_causal · smollm2_135m`` or ``upstream · llama3_1b · static 512``.

    The strategy first: MLflow's lists and legends show some twenty characters, and rows of one model must differ.  What
    ``python -m pipeline`` does by itself (:data:`PLAIN`) is not said.
    """
    return " · ".join(part for part in _name_parts(config) if part not in PLAIN)


def _name_parts(config: Config) -> list[str]:
    model, strategy, backend, shape = config.model, config.strategy, config.backend, config.shape
    who = Path(model.path).resolve().name if model.path else model.name
    if backend.name == "tensorrt":
        special = [strategy.unproven] if strategy.unproven in ("force", "error") else []
        special += [f"assume {condition}" for condition in strategy.assume]
        how = strategy.name + (f" ({', '.join(special)})" if special else "")
    else:
        how = backend.name + (f" ({backend.mode})" if backend.mode else "")
    length = f"{shape.min}..{shape.max}" if shape.kind == "dynamic" else str(shape.max)
    return [
        how,
        who + (" (random)" if model.weights == "random" else ""),
        config.precision,
        f"{shape.kind} {length}",
        *([f"batch {shape.batch}"] if shape.batch > 1 else []),
        *([f"{config.cache.name} cache"] if config.cache.name != "none" else []),
    ]


def folder_name(config: Config) -> str:
    """What the run is, plain or not, as part of a path that no shell needs quoted: letters, digits, ``_ . + -`` alone,
    and no longer than file systems take beside a time."""
    name = re.sub(r"[^\w.+-]+", "-", re.sub(r"[()]", "", " ".join(_name_parts(config))))
    return name.encode()[:200].decode(errors="ignore").strip("-")


def job_name(label: str) -> str:
    """How a job of a sweep differs from its siblings, from its ``label`` (``precision=bf16 strategy=upstream seed=1``):
    ``upstream · bf16 · seed 1``."""
    settings = [each.partition("=") for each in re.split(r" (?=[+~\w.@/]+=)", label)]
    settings.sort(key=lambda each: each[0] not in FIRST)
    said = []
    for key, equals, value in settings:
        name = key.lstrip("+~").rpartition(".")[2]
        value = Path(value).name if name == "path" else value
        said.append(key + equals + value if not equals else value if key in SPEAKS else f"{name} {value}")
    return " · ".join(said)


def parameters(config: Config) -> dict[str, str]:
    """Every setting that has a value, dotted; values as YAML would write them, lists on one line."""
    settings = {}
    for key, value in _leaves(config.to_dict(), unfold=False):
        if value is not None:
            settings[key] = redacted(value) if isinstance(value, str) else json.dumps(value)
    return settings


def plain_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that people ask for first, under plain names: ``ms_per_token`` and ``ms_prompt`` (medians on the
    device, the latter of the first token where no prompt was timed by itself), ``relative_error`` (of the worst case
    of the verification), ``perplexity`` and ``perplexity_increase`` (a share) where the precision's cost was measured,
    and ``engine_mb``; ``speed_up`` is a sweep's, see :func:`pipeline.sweep.table.speed_ups`."""
    benchmark = (report.get("benchmark") or {}) if times_count(report) else {}
    generate, prefill = benchmark.get("generate") or {}, benchmark.get("prefill") or {}
    cost = (report.get("quality") or {}).get("cost") or {}
    prompt, size = prefill.get("device_ms") or generate.get("ttft_ms") or {}, engine_bytes(report)
    found = {
        "ms_per_token": (generate.get("tpot_ms") or {}).get("median"),
        "ms_prompt": prompt.get("median"),
        "relative_error": relative_error(report),
        "perplexity": (cost.get("perplexity") or {}).get("value"),
        "perplexity_increase": (cost.get("increase") or {}).get("value"),
        "engine_mb": None if size is None else size / 1e6,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a report under its dotted name; true and false are 1 and 0.

    The :func:`plain_metrics` stand among them.  Cases of a list go by their name, the attention calls stay in their
    table, and ``benchmark`` counts only when what was timed had been verified.
    """
    sections = {key: value for key, value in report.items() if key not in NO_METRICS}
    decode = sections.get("decode") or {}
    sections["attention"] = _without_calls(sections.get("attention"))
    sections["decode"] = {**decode, "attention": _without_calls(decode.get("attention"))}
    if not times_count(report):
        sections.pop("benchmark", None)
    dotted = {key: float(value) for key, value in _leaves(sections) if isinstance(value, Real)}
    return plain_metrics(report) | dotted


def _without_calls(attention: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (attention or {}).items() if key != "calls"}


def final_tags(report: Mapping[str, Any]) -> dict[str, str]:
    """What runs are filtered by: status, failure, environment, the engine's hash, what was verified (``engine``,
    ``graph`` or ``no``) and what tainted a measurement."""
    tags = {"status": report["status"], **environment_tags(report.get("environment") or {})}
    if report.get("unavailable"):
        tags["unavailable"] = report["unavailable"]
    failure = report.get("failure") or {}
    tags |= {f"failure.{key}": failure[key] for key in ("stage", "kind", "message") if key in failure}
    if sha256 := (report.get("engine") or {}).get("sha256"):
        tags |= {"engine.sha256": sha256, "engine.verified": verified_by(report)}
    for key, value in _leaves(report.get("benchmark") or {}, "benchmark"):
        if key.endswith(".tainted") and value:
            tags[key] = "; ".join(value)
    return tags


def environment_tags(environment: Mapping[str, Any]) -> dict[str, str]:
    """Versions, GPU and commit; what is unknown (null) gets no tag."""
    tags = {k: v if isinstance(v, str) else json.dumps(v) for k, v in environment.items() if v is not None}
    if "git" in tags:
        tags["mlflow.source.git.commit"] = tags["git"]  # the name under which MLflow's pages show it
    return tags


def _leaves(value: Any, prefix: str = "", unfold: bool = True) -> Iterator[tuple[str, Any]]:
    """Everything below ``value`` that is not a mapping, dotted; with ``unfold``, lists of mappings and
    95 % intervals too."""
    if unfold and isinstance(value, list):
        if value and all(isinstance(item, Mapping) for item in value):
            value = dict(zip(_item_names(value), value, strict=True))
        elif prefix.endswith(".ci95") and len(value) == 2:
            value = {"low": value[0], "high": value[1]}
    if isinstance(value, Mapping) and (value or not prefix):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key), unfold)
    else:
        yield prefix, value


def _item_names(items: list[Mapping[str, Any]]) -> list[str]:
    """Names of report entries in a list: their own, else their shape; numbered where that is not unique."""
    names = []
    for item in items:
        shape = [f"{key}_{item[key]}" for key in ("batch", "input_length", "output_length") if key in item]
        names.append(str(item.get("name") or "_".join(shape)))
    often = Counter(names)
    return [name if name and often[name] == 1 else f"{name}_{i}".strip("_") for i, name in enumerate(names)]


def legal(key: str) -> str:
    """``key`` with what MLflow takes in names (its limit is 250 characters)."""
    return re.sub(r"[^\w.\- :]", "_", key)[:250]


POINTS = 200
"""Of a curve of samples, evenly spaced: more than a chart shows, and few enough to be sent in a moment."""


def sample_points(
    samples: Mapping[str, Mapping[str, list[float]]], benchmark: Mapping[str, Any]
) -> Iterator[tuple[str, int, float]]:
    """Metric, step and value of every curve of ``samples.json``: a sample's number in its measurement; of
    ``generate.step_ms``, the time of each decode step, the tokens that are in the cache when it begins."""
    for entry, series in samples.items():
        for name, values in series.items():
            first = benchmark["generate"]["input_length"] if (entry, name) == ("generate", "step_ms") else 0
            stride = max(1, -(-len(values) // POINTS))
            for number in range(0, len(values), stride):
                yield f"samples.{entry}.{name}", first + number, values[number]
