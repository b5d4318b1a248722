"""One run: load → trace → prove, rewrite → network → build → verify → (write →) measure → record, read top to bottom.

Each stage takes values and returns one; what came back is recorded here, and nowhere else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.frame import Outcome, framed, unavailable
from pipeline.host.memory import collector_paused, trim
from pipeline.host.turn import Turn, alone
from pipeline.record.console import StageDisplay
from pipeline.record.record import Record
from pipeline.record.sections import Status

if TYPE_CHECKING:
    import torch

    from passes.tensorrt.versions import Stack
    from pipeline.engine.programs import Program
    from pipeline.engine.sections import Engines
    from pipeline.model.load import LoadedModel
    from pipeline.model.real_text import RealText
    from pipeline.record.environment import Environment
    from pipeline.store.reuse import Place
    from pipeline.tracking.runs import Tracked
    from pipeline.verify.candidate import Machine, Wanted
    from pipeline.verify.sections import Verification


def run(
    config: Config,
    display: StageDisplay | None = None,
    track: Callable[..., Tracked] | None = None,
    turn: Turn = alone,
) -> Outcome:
    """Do what ``config`` says.  Raises :class:`passes.errors.UserError`, and then nothing was created; whatever
    goes wrong later is in the report.  Ctrl-C and SIGTERM are passed on, with the report written.

    ``track`` stands in for :func:`pipeline.tracking.runs.start`, and the store is then not asked whether it is there.
    ``turn`` is taken before anything is timed.
    """
    if config.generates and config.model.logits != "last":  # of a prompt, generation needs no other
        config = replace(config, model=replace(config.model, logits="last"))
    if config.backend.name == "plugin":
        return framed(config, display, track, unavailable, lambda record, folder, loaded: "unavailable")
    work = _tensorrt if config.backend.name == "tensorrt" else _rival
    return framed(config, display, track, _load, partial(work, turn=turn))


@dataclass(frozen=True)
class Loaded:
    """The model, where it runs, what it has to do there, the text on which its precision's cost is measured, and what
    the device held before the model was loaded."""

    model: LoadedModel
    device: torch.device
    environment: Environment
    wanted: Wanted
    text: RealText | str | None
    context_bytes: int | None


def _load(record: Record) -> Loaded:
    """Whatever the user got wrong must come to light here."""
    import torch

    from passes.tensorrt.versions import load_stack
    from pipeline.engine import programs
    from pipeline.host import gpu
    from pipeline.model import limits, quantise
    from pipeline.record.environment import environment
    from pipeline.store.entries import Store
    from pipeline.verify import candidate, quality

    config, builds = record.config, record.config.backend.name == "tensorrt"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here, context_bytes = environment(load_stack().versions() if builds else None), gpu.context_bytes()
    record.put(environment=here)
    model = quantise.load(config.model, config.precision, config.quantize, device, config.seed, record.update)
    text = quality.text_for(config.verify, model) if config.judges_quality else None
    record.note(*model.notes)
    limits.check_fit(model, config.shape, config.benchmark.generate, config.seed, config.runs_at_one_length)
    limits.check_range(model, config.precision, config.seed)
    limits.check_attention(model, config.backend)
    asked = (config.cache, config.shape, config.benchmark.generate)
    cache = programs.cache_of(model.model, *asked) if builds else None
    if config.looks_into_store:
        Store.of(config.store)  # refuses a folder that cannot be written
    record.put(model=model.describe())
    record.detail = f"{model.parameters / 1e6:.0f} M parameters from {model.source}"
    wanted = candidate.Wanted(config.shape, cache, config.runs_at_one_length, config.benchmark.generate is not None)
    return Loaded(model, device, here, wanted, text, context_bytes)


def _tensorrt(record: Record, folder: Path, loaded: Loaded, turn: Turn) -> Status:
    """trace → … → build, or the same engines out of the store; then verify → measure."""
    from passes.tensorrt.versions import load_stack
    from pipeline.deploy import log
    from pipeline.store import reuse
    from pipeline.store.entries import Store
    from pipeline.store.key import ingredients
    from pipeline.verify import candidate

    config, stack, on_gpu = record.config, load_stack(), loaded.device.type == "cuda"
    store = Store.of(config.store) if config.looks_into_store else None
    judged_as = reuse.judged_as(config.verify, config.seed, loaded.text)
    decided_by = {} if store is None else ingredients(config, loaded.model, stack, loaded.device)
    taken_over = judged_as if config.reaches("verify") and not on_gpu else None
    with reuse.engine_of(folder, store, decided_by, taken_over, record.note, record.display.note) as place:
        record.put(store=place.lookup())
        made_from: dict[str, Program] = {}
        if (kept := place.kept) is not None:
            engines = kept.engines
            record.put(attention=engines.attention, engine=engines.engine, decode=engines.decode)
            record.note(*engines.notes)
            record.display.done("store", place.seconds, f"hit {place.key[:12]}, built {kept.built}")
        else:
            made_from, loaded = _rewrite(record, loaded)
            engines = _build(record, folder, loaded, stack, place, made_from)

        if kept is not None and not on_gpu:
            record.stop_before("verify")
            verification = replace(kept.verification, stored=True)
            record.put(verify=verification, quality=kept.quality, store=place.lookup(verified=True))
        else:
            with record.stage("verify"):
                if on_gpu:
                    graph, kernels = config.backend.cuda_graph, place.runtime_cache
                    what = candidate.engines(folder, loaded.model, loaded.wanted, graph, kernels)
                else:  # no engine can run; what can be checked are the graphs that they were built from
                    what = candidate.graphs(made_from, loaded.model, loaded.wanted, config.number_type)
                verification = _verify(record, loaded, what, stack.flavour, engines.attention.summary.assumed)
        kept_of = partial(reuse.Kept, engines, verification, judged_as)
        place.keep(kept_of(record.report.stages_s, record.report.quality), record.note)
    if config.exports:  # the store keeps no graphs
        _export(record, folder, stack, made_from or _rewrite(record, loaded)[0], engines, verification)
    record.note(*log.leave(folder, config, loaded.model, engines, verification, loaded.environment))
    if not on_gpu:
        return "not_executed"
    what.finished()
    made_from.clear()  # with PyTorch's weights
    _measure(record, loaded, what, turn)
    what.finished()
    return "ok"


def _rewrite(record: Record, loaded: Loaded) -> tuple[dict[str, Program], Loaded]:
    """export → strategy, for each of the run's programs; returns them, and ``loaded`` with the KV cache that they have.

    Layers that need not keep every token are found here, where the store has no engine: to find them is a trace."""
    from pipeline.engine import programs

    config = record.config
    with record.stage("export"), collector_paused():
        model, small = loaded.model.model, loaded.model.quantised
        cache, parts = programs.with_rings(model, config.model, config.shape, loaded.wanted.cache, small)
        traced = {name: trace() for name, trace in parts.items()}
        for name, each in traced.items():
            record.put_graph(name, "graph_before.txt", each.program.graph)
        record.detail = " + ".join(f"{len(each.program.graph.nodes)} nodes" for each in traced.values())

    with record.stage("strategy"):
        made = {}
        for name, each in traced.items():
            made[name] = programs.rewritten(each, config.strategy)
            record.put_graph(name, "graph_after.txt", made[name].program.graph)
            record.put_attention(name, made[name].attention)
        record.detail = " + ".join(str(each.attention.summary) for each in made.values())
    return made, replace(loaded, wanted=replace(loaded.wanted, cache=cache))


def _build(
    record: Record, folder: Path, loaded: Loaded, stack: Stack, place: Place, made_from: dict[str, Program]
) -> Engines:
    """lower → interpret → build, for each program of ``made_from``; returns what the engines in ``folder`` are."""
    from pipeline.engine import kernel_cache, network, unfused
    from pipeline.engine.build import build_engine
    from pipeline.engine.file import write_engine
    from pipeline.engine.sections import engines_of

    config, asked, cache, kind = record.config, record.config.strategy, loaded.wanted.cache, record.config.number_type
    notes = tuple(dict.fromkeys(note for each in made_from.values() for note in each.notes))
    record.note(*notes)

    with record.stage("lower"), collector_paused():
        lowered = {
            name: network.lower(stack, each.program, each.inputs, config.backend, kind, config.holds_small(name))
            for name, each in made_from.items()
        }

    with record.stage("interpret"), kernel_cache.fused_kernels(place.fused_kernels) as kernels:
        networks, conversion = {}, network.UPSTREAM
        if asked.name != "upstream":
            without = asked.without if config.backend.fused_rows is not False else [*asked.without, *network.ROWS]
            conversion = network.ours(cache is not None and cache.mode == "in_engine", without, kernels)
        for name, low in lowered.items():
            networks[name] = network.interpret(stack, low, conversion)
            record.put_engine(name, networks[name].contents)
        if asked.require_fused:
            found = {name: each.contents for name, each in networks.items()}
            unfused.refuse(found, {name: each.attention for name, each in made_from.items()})

    with record.stage("build"):
        built = {}
        for name in list(networks):
            made = build_engine(stack, networks.pop(name), record.display.steps, place.timing_cache, f"{name}.trt")
            built[name] = made.engine
            record.put_engine(name, made.engine)
            conditions, inputs = made_from[name].attention.summary.assumed, made_from[name].inputs
            here, guarded = asdict(loaded.environment), bool(asked.guard)
            write_engine(folder, made.data, made.engine, inputs, here, conditions, guarded, cache, made.read)
            del made  # hundreds of megabytes, and on disk
        record.detail = f"{sum(engine.bytes or 0 for engine in built.values()) / 1e6:.0f} MB"
    del lowered
    gc.collect()
    trim()
    return engines_of({name: each.attention for name, each in made_from.items()}, built, notes)


def _export(
    record: Record, folder: Path, stack: Stack, made_from: dict[str, Program], engines: Engines, verified: Verification
) -> None:
    """Write what was verified for those who have none of this project's code."""
    from pipeline.engine import pt2

    with record.stage("write"):
        found = pt2.export(folder, made_from, stack, verified.executed)
        record.put(export=found)
        record.detail = f"{', '.join(found.files)}: {sum(each.bytes for each in found.files.values()) / 1e6:.0f} MB"
    record.note(*pt2.notes(found, engines.attention.summary.assumed))


def _rival(record: Record, folder: Path, loaded: Loaded, turn: Turn) -> Status:
    """verify → measure of eager PyTorch or torch.compile; without a GPU nothing is timed."""
    from pipeline.verify import candidate

    config, name = record.config, record.config.backend.name
    record.note(f"backend={name} runs the model as it is: strategy has no part in this run")
    if config.benchmark.generate is None and config.cache.name != "none":
        record.note(f"cache={config.cache.name} has no part in this run: nothing is generated")
    if loaded.device.type != "cuda":
        record.note("no GPU: nothing was run")
        return "not_executed"
    with record.stage("verify"):
        what = candidate.rival(config.backend, loaded.model, loaded.wanted, config.model, config.cache)
        _verify(record, loaded, what)
    _measure(record, loaded, what, turn)
    return "ok"


def _verify(
    record: Record, loaded: Loaded, what: Machine, flavour: str | None = None, assumed: Collection[str] = ()
) -> Verification:
    """Record what is found step by step; the first that fails ends the run."""
    from pipeline.verify import quality, stage

    config, model = record.config, loaded.model
    record.note(*stage.notes(what.executed, config.number_type, flavour))
    for found in stage.verify(
        what, model, config.model, config.verify, precision=config.number_type, seed=config.seed, flavour=flavour,
        generate=config.benchmark.generate, assumed=assumed, progress=record.display.steps,
    ):  # fmt: skip
        record.put(verify=found)
        stage.gate(found)
    record.detail = str(found)
    if config.judges_quality:
        cost = quality.judge(
            what, model, config.model, config.strategy, config.verify, loaded.text, config.number_type,
            record.display.steps,
        )  # fmt: skip
        record.put(quality=cost)
        quality.gate(cost)
    return found


def _measure(record: Record, loaded: Loaded, what: Machine, turn: Turn) -> None:
    """Time what was verified; nothing else ever reaches this."""
    from pipeline.measure import stage

    config, cached = record.config, record.config.cache.name != "none"
    if not config.benchmark.shapes and what.generator is None:
        return
    assert what.runner is not None
    with turn() as waiting, record.stage("benchmark"):
        for found in stage.measure(
            what.runner, what.generator, loaded.model, config.benchmark, logits=config.model.logits,
            precision=config.quantize.products_in(config.precision), seed=config.seed, cached=cached, waiting=waiting,
            few_bits=(config.holds_small("engine"), config.holds_small("decode")),
            held=what.held, context_bytes=loaded.context_bytes,
        ):  # fmt: skip
            record.put_benchmark(found)
        record.draw(found)
