"""One run, from its configuration to its report: the whole way, read top to bottom."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import UserError
from pipeline import interrupts
from pipeline.config import Config
from pipeline.console import StageDisplay
from pipeline.files import check_output
from pipeline.memory import collector_paused, trim
from pipeline.record import Record, StopHere

if TYPE_CHECKING:
    import torch

    from pipeline.cached import CacheShape
    from pipeline.machine import Machine
    from pipeline.model import LoadedModel
    from pipeline.tracking import Tracked

QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Outcome:
    """``report`` is what report.json in ``folder`` says."""

    report: dict[str, Any]
    folder: Path


Turn = Callable[[], AbstractContextManager[Collection[int]]]
"""Entered to have the GPU to itself; gives the ids of the processes that lie on it and launch nothing meanwhile."""


def alone() -> AbstractContextManager[Collection[int]]:
    """The turn of a run that shares the GPU with nobody."""
    return nullcontext(())


def run(
    config: Config,
    display: StageDisplay | None = None,
    track: Callable[..., Tracked] | None = None,
    turn: Turn = alone,
) -> Outcome:
    """Do what ``config`` says.  Raises :class:`passes.errors.UserError`, and then nothing was created; whatever
    goes wrong later is in the report.  Ctrl-C and SIGTERM are passed on, with the report written.

    ``track`` stands in for :func:`pipeline.tracking.start`, and the store is then not asked whether it is there.
    ``turn`` is taken before anything is timed.
    """
    from pipeline import plugin, recovery, tracking
    from pipeline.tracking_names import folder_name

    if config.generates and config.model.logits != "last":  # of a prompt, generation needs no other
        config = replace(config, model=replace(config.model, logits="last"))
    record = Record(config, display or StageDisplay())
    check_output(config.output)
    recovers = track is None
    if track is None:
        tracking.check_store(config.tracking.uri)
        track = tracking.start
    loaded = cache = interruption = None
    status = "ok"
    try:
        with record.stage("load"), collector_paused():
            if config.backend.name == "plugin":
                status = plugin.unavailable(record)
            else:
                loaded, device, cache = _load(record)
    except Exception as error:
        interrupts.check()  # a library may have made another error of it
        if isinstance(error, UserError):
            raise
        record.fail(error)
    gc.collect()
    trim()
    gc.freeze()  # a million objects of the libraries that the collector need not walk again and again
    with interrupts.held():  # an interruption ends the work, not the opening or the closing of the run
        folder = record.open_folder(folder_name(config))
        try:
            tracked = track(config, folder, environment=record.report["environment"])
        except BaseException:
            record.discard_folder()
            raise
        record.report["mlflow"] = tracked.identity
        with tracked:
            try:
                with interrupts.allowed():
                    record.checkpoint()
                    for note in config.notes:
                        record.note(note)
                    if recovers:
                        recovery.recover(config, record.display.note)
                    if loaded is not None:
                        if config.backend.name == "tensorrt":
                            status = _tensorrt(record, loaded, device, cache, turn)
                        else:
                            status = _rival(record, loaded, device, turn)
            except StopHere:
                pass
            except Exception as error:
                record.fail(error)
            except BaseException as error:
                record.fail(error)
                interruption = error
            record.close(status)
            sent = tracked.finish(record.report, folder)
            record.release(sent)
        record.display.summary(record.report, folder, f"run {tracked.run_id}  ({tracked.where})")
        if not sent:
            record.display.note("the next start with this output and this store sends the rest to MLflow")
    if interruption is not None:
        raise interruption
    return Outcome(record.report, folder)


def _load(record: Record) -> tuple[LoadedModel, torch.device, CacheShape | None]:
    """Weights, tokenizer, device, environment and the engines' KV cache; whatever the user got wrong must come to light
    here."""
    import torch

    from passes.stack import load_stack
    from pipeline import building, model, reuse
    from pipeline.environment import environment
    from pipeline.store import Store
    from pipeline.text import token_batch

    config = record.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = load_stack().versions() if config.backend.name == "tensorrt" else None
    record.report["environment"] = environment(versions)
    loaded = model.load(config.model, config.precision, device, config.seed, record.update)
    for note in loaded.notes:
        record.note(note)
    described = loaded.model.config.get_text_config()
    limit = getattr(described, "max_position_embeddings", None)
    if limit is not None and config.shape.max > limit:
        raise UserError(f"shape.max={config.shape.max}: above max_position_embeddings={limit} of {loaded.source}")
    generate = config.benchmark.generate
    if limit is not None and generate is not None and generate.input_length + generate.output_length > limit:
        raise UserError(
            f"benchmark.generate.output_length={generate.output_length}: with the prompt "
            f"{generate.input_length + generate.output_length} tokens, above max_position_embeddings={limit} of "
            f"{loaded.source}"
        )
    token_batch(loaded.tokenizer, described.vocab_size, 1, 1, config.seed)  # refuses a tokenizer of another model
    cache = building.cache_of(config, loaded) if config.backend.name == "tensorrt" else None
    if reuse.applies(config):
        Store.of(config.store)  # refuses a folder that cannot be written
    record.report["model"] = loaded.describe()
    record.detail = f"{loaded.parameters / 1e6:.0f} M parameters from {loaded.source}"
    return loaded, device, cache


def _tensorrt(record: Record, loaded: LoadedModel, device: torch.device, cache: CacheShape | None, turn: Turn) -> str:
    """export → … → build, or the same engines out of the store; then verify → benchmark; returns the status."""
    from passes.stack import load_stack
    from pipeline import building, machine, reuse

    config, report, stack = record.config, record.report, load_stack()
    with reuse.engine_of(record, loaded, device, stack) as place:
        programs = None if place.restored else building.build(record, stack, loaded, cache, place.timing_cache)
        assert record.folder is not None
        assumed = building.assumed(report)
        if device.type == "cuda":
            with record.stage("verify"):
                what = machine.engines(config, loaded, record.folder, cache, place.runtime_cache)
                _verify(record, loaded, what, assumed)
        elif programs is None:
            place.take_over_verification()
        else:
            with record.stage("verify"):
                # Without a GPU no engine can run; what can be checked are the graphs that they were built from.
                _verify(record, loaded, machine.graphs(config, loaded, programs, cache), assumed)
        place.keep()
    if device.type != "cuda":
        return "not_executed"
    what.finished()
    _benchmark(record, loaded, what, turn)
    what.finished()
    return "ok"


def _rival(record: Record, loaded: LoadedModel, device: torch.device, turn: Turn) -> str:
    """verify → benchmark of eager PyTorch or torch.compile; without a GPU nothing is timed."""
    from pipeline.export import CallForm
    from pipeline.machine import Machine
    from pipeline.rival_generators import rival_generator
    from pipeline.rivals import TorchRunner

    config = record.config
    name, generates = config.backend.name, config.benchmark.generate is not None
    record.note(f"backend={name} runs the model as it is: strategy has no part in this run")
    if not generates and config.cache.name != "none":
        record.note(f"cache={config.cache.name} has no part in this run: nothing is generated")
    if device.type != "cuda":
        record.note("no GPU: nothing was run")
        return "not_executed"
    runner = TorchRunner(CallForm(loaded.model, config.model.logits), config.model.inputs, config.backend)
    generator = rival_generator(loaded.model, config.backend, config.cache) if generates else None
    what = Machine(name, runner, runner, generator)
    with record.stage("verify"):
        _verify(record, loaded, what)
    _benchmark(record, loaded, what, turn)
    return "ok"


def _verify(record: Record, loaded: LoadedModel, what: Machine, assumed: Collection[str] = ()) -> None:
    """Judge ``what`` against wider PyTorch, let it answer a question, judge what it generates, and end the run if it
    failed; then show what it does to inputs outside of what was ``assumed``, on which it is not judged."""
    import torch

    from pipeline import arithmetic, generation, verify
    from pipeline.cases import Case, case_inputs, cases, split
    from pipeline.export import CallForm
    from pipeline.model import DTYPES, load_reference
    from pipeline.text import tokens_for

    config, device = record.config, loaded.model.device
    names = config.model.inputs
    form = CallForm(loaded.model, config.model.logits)
    same = replace(config.model, revision=loaded.revision)  # a branch may have moved since
    reference = CallForm(load_reference(same, config.precision, device, config.seed), config.model.logits)

    def inputs_of(case: Case) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        seed = config.seed + case.sample
        return case_inputs(case, names, tokens_for(loaded, config.shape.batch, case.length, seed))

    def own(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return form(**inputs)

    computing = (what.executed, config.precision, record.report["environment"]["flavour"])
    arithmetics = arithmetic.yardsticks(*computing)
    if "pytorch_tf32" in arithmetics:
        record.note("TensorRT-RTX multiplies fp32 in TF32, whatever the builder's flag: judged by PyTorch in TF32")
    yardsticks = {name: arithmetic.in_arithmetic(own, each) for name, each in arithmetics.items()}

    def judged(done: int, total: int) -> None:
        trim()
        record.display.steps("case", done, total)

    judge = partial(
        verify.judge,
        inputs_of=inputs_of,
        reference=lambda inputs: reference(**inputs),
        yardsticks=yardsticks,
        candidate=what.forward,
        precision_eps=torch.finfo(DTYPES[config.precision]).eps / 2,
        progress=judged,
    )
    lengths = replace(config.shape, min=1) if config.runs_at_one_length else config.shape
    ragged = what.longest > 0 and config.shape.batch > 1  # a cache's rows are at places of their own
    kernels = what.executed != "graph"
    every = cases(config.verify, lengths, names, config.model.logits, what.longest, what.exact, ragged, kernels)
    inside, outside = split(every, assumed, names, config.shape.batch)
    described = {"executed": what.executed, "arithmetic": arithmetic.described(*computing), "factor": verify.FACTOR}
    record.report["verify"] = {**described, **judge(inside)}
    if loaded.tokenizer is not None and config.shape.kind == "dynamic" and config.shape.batch == 1:
        record.report["verify"]["answer"] = verify.answers(
            loaded.tokenizer, QUESTION, what.forward, yardsticks["pytorch"], names, config.shape.max, device
        )
    record.detail = f"{len(inside)} cases on the {what.executed}"
    verify.gate(record.report["verify"])
    if what.generator is not None:
        generation.verify(record, loaded, what.generator, list(arithmetics.values())[-1])
    if outside:
        record.report["verify"]["outside"] = verify.cost(judge(outside)["cases"], assumed)


def _benchmark(record: Record, loaded: LoadedModel, what: Machine, turn: Turn) -> None:
    """Time what was verified; nothing else ever reaches this."""
    import torch

    from pipeline import benchmark, ceilings, generation, gpu
    from pipeline.plots import latency_plot
    from pipeline.roofline import decoder_cost
    from pipeline.text import tokens_for

    config = record.config
    if not config.benchmark.shapes and what.generator is None:
        return
    assert what.runner is not None
    gc.collect()
    torch.cuda.empty_cache()  # what the verification took
    with turn() as waiting, record.stage("benchmark"):
        cost = decoder_cost(loaded.model, config.model.logits)
        roof, read_state = ceilings.measure(config.precision), partial(gpu.read_state, waiting)
        tokens = partial(tokens_for, loaded, seed=config.seed)
        result = benchmark.measure(
            what.runner, config.benchmark, tokens, cost, roof, config.precision, read_state=read_state
        )
        if what.generator is not None:
            result = result.joined(generation.measure(record, loaded, what.generator, cost, roof, read_state))
        result.report["tokens"] = "real text" if loaded.tokenizer is not None else "random, seeded"
        record.report["benchmark"] = result.report
        record.keep_json("samples.json", result.samples)
        assert record.folder is not None
        latency_plot(result.samples, record.folder / "latency.png")
