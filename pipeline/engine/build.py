"""export → strategy → lower → interpret → build: from the loaded model to engine files in the run's folder."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from passes.graph.driver import Rewritten, apply_strategy
from passes.tensorrt.versions import Stack
from pipeline.config.schema import Config, StrategyConfig
from pipeline.engine import network
from pipeline.engine.runner import write_engine
from pipeline.host.memory import collector_paused, trim
from pipeline.model.load import LoadedModel
from pipeline.record.record import Record
from pipeline.record.report import calls_table
from pipeline.trace import cached_forms, call_form
from pipeline.trace.cached_forms import CacheShape
from pipeline.trace.call_form import InputSpec, Traced


@dataclass(frozen=True)
class Program:
    """A program that an engine was built from, after its strategy; ``inputs`` in the order of its arguments."""

    program: ExportedProgram
    inputs: tuple[InputSpec, ...]


def cache_of(config: Config, loaded: LoadedModel) -> CacheShape | None:
    """The KV cache that this run's engines share; None without one."""
    if config.cache.name == "none":
        return None
    generate = config.benchmark.generate
    longest = generate.input_length + generate.output_length if generate else config.shape.max + cached_forms.GRANULE
    return cached_forms.cache_shape(loaded.model, config.cache, config.shape, max(longest, config.shape.max + 1))


def parts(config: Config, loaded: LoadedModel, cache: CacheShape | None) -> dict[str, Callable[[], Traced]]:
    """What is built, by the name of its engine file: one program, or with a cache the prompts' (``engine``) and the
    next token's (``decode``); each with the function that traces it."""
    model, device = loaded.model, loaded.model.device
    if cache is None:
        form = call_form.CallForm(model, config.model.logits)
        return {"engine": lambda: call_form.trace(form, config.model, config.shape, device)}
    prefill, decode = cached_forms.PrefillForm(model, len(cache.layers)), cached_forms.DecodeForm(model)
    return {
        "engine": lambda: cached_forms.trace_prefill(prefill, cache, config.shape, device),
        "decode": lambda: cached_forms.trace_decode(decode, cache, device),
    }


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
            name: apply_strategy(each.program, asked.name, asked.unproven, asked.assume)
            for name, each in traced.items()
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
            built = network.build(stack, networks.pop(name), record.display.steps, timing_cache)
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


def assumed(report: dict[str, Any]) -> list[str]:
    """The conditions on whose word masks were dropped from the engine of this ``report``."""
    return list(report["attention"]["summary"]["assumed"])


def dropped(rewritten: Rewritten, strategy: StrategyConfig) -> Iterator[str]:
    """What the reader must know of masks that were dropped without a proof for every input."""
    yield from dict.fromkeys(call.disagreement for call in rewritten.calls if call.disagreement)
    forced: dict[str, list[str]] = {}  # calls that share a mask share the warning
    for call in rewritten.calls:
        if call.unproved:
            shown = (call.counterexample or {}).get("text")
            forced.setdefault(f"({call.reason})" + (f"; {shown}" if shown else ""), []).append(call.name)
    for why, names in forced.items():
        calls = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        yield f"{calls}: mask dropped unproved; right only where it happens to be causal {why}"
    if rewritten.assumed:
        checked = "the runtime checks it" if strategy.guard else "nothing checks it (strategy.guard=false)"
        yield f"masks were dropped on your word that {', '.join(rewritten.assumed)} holds for every input; {checked}"
    if unused := [condition for condition in strategy.assume if condition not in rewritten.assumed]:
        yield f"strategy.assume: no mask was dropped on the word of {', '.join(unused)}"
