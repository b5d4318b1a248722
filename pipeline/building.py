"""export → strategy → lower → interpret → build: from the loaded model to engine files in the run's folder."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from passes.graph.driver import rewrite
from passes.tensorrt.versions import Stack
from pipeline.engine import network
from pipeline.engine.build import build_engine
from pipeline.engine.file import write_engine
from pipeline.engine.programs import Program, dropped, parts
from pipeline.host.memory import collector_paused, trim
from pipeline.model.load import LoadedModel
from pipeline.record.record import Record
from pipeline.record.report import calls_table
from pipeline.trace.cache_shape import CacheShape


def build(
    record: Record, stack: Stack, loaded: LoadedModel, cache: CacheShape | None, timing_cache: Path | None
) -> dict[str, Program]:
    """Leave the engines in the run's folder and what they are in the report; the second one's sections, ``decode``,
    stand inside the first one's.  Returns the programs that they were made from, by the same names."""
    config, report = record.config, record.report
    with record.stage("export"), collector_paused():
        traced = {name: trace() for name, trace in parts(config, loaded, cache).items()}
        for name, each in traced.items():
            record.keep(_file("graph_before.txt", name), str(each.program.graph))
        record.detail = " + ".join(f"{len(each.program.graph.nodes)} nodes" for each in traced.values())

    with record.stage("strategy"):
        asked = config.strategy
        rewritten = {
            name: rewrite(each.program, asked.name, asked.unproven, asked.assume) for name, each in traced.items()
        }
        described = {name: each.describe() for name, each in rewritten.items()}
        for name, after in rewritten.items():
            record.keep(_file("graph_after.txt", name), str(after.program.graph))
            record.keep(_file("attention_calls.md", name), calls_table(described[name]["calls"]))
            _put(report, "attention", name, described[name])
        actions = [str(section["summary"]["by_action"]) for section in described.values()]
        record.detail = " + ".join(actions).replace("'", "").replace("{", "").replace("}", "")
    for note in dict.fromkeys(note for each in rewritten.values() for note in dropped(each, asked)):
        record.note(note)

    with record.stage("lower"), collector_paused():
        lowered = {
            name: network.lower(stack, each.program, traced[name].inputs, config.backend, config.precision)
            for name, each in rewritten.items()
        }

    with record.stage("interpret"):
        networks, untouched = {}, config.strategy.name == "upstream"
        for name, low in lowered.items():
            in_place = cache is not None and cache.mode == "in_engine"
            fused_rows = config.backend.fused_rows is not False and not untouched
            networks[name] = network.interpret(stack, low, untouched, in_place, fused_rows)
            _put(report, "engine", name, networks[name].contents)

    with record.stage("build"):
        assert record.folder is not None
        size = 0
        for name in list(networks):
            built = build_engine(stack, networks.pop(name), record.display.steps, timing_cache)
            section = built.section | {"file": f"{name}.trt"}
            _put(report, "engine", name, section)
            conditions, guard = rewritten[name].assumed, bool(asked.guard)
            write_engine(
                record.folder, built.data, section, traced[name].inputs, report["environment"], conditions, guard, cache
            )
            size += section["bytes"]
            del built  # hundreds of megabytes, and on disk
        record.detail = f"{size / 1e6:.0f} MB"
    del lowered
    gc.collect()
    trim()
    return {name: Program(each.program, traced[name].inputs) for name, each in rewritten.items()}


def _file(name: str, part: str) -> str:
    return name if part == "engine" else f"{part}_{name}"


def _put(report: dict[str, Any], section: str, part: str, content: dict[str, Any]) -> None:
    """The first program's content is the section; that of another stands in it under its name."""
    if part == "engine":
        report[section] = content
    else:
        report[section] = {**report[section], part: content}
