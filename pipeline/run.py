"""One run, from its configuration to its report: the whole way, read top to bottom."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import UserError
from pipeline.config.schema import Config
from pipeline.host import interrupts
from pipeline.host.files import check_output
from pipeline.host.memory import collector_paused, trim
from pipeline.host.turn import Turn, alone
from pipeline.record.console import StageDisplay
from pipeline.record.record import Record, StopHere

if TYPE_CHECKING:
    import torch

    from pipeline.model.load import LoadedModel
    from pipeline.trace.cache_shape import CacheShape
    from pipeline.tracking.runs import Tracked


@dataclass(frozen=True)
class Outcome:
    """``report`` is what report.json in ``folder`` says."""

    report: dict[str, Any]
    folder: Path


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
    from pipeline.tracking import recovery, runs
    from pipeline.tracking.names import folder_name

    if config.generates and config.model.logits != "last":  # of a prompt, generation needs no other
        config = replace(config, model=replace(config.model, logits="last"))
    record = Record(config, display or StageDisplay())
    check_output(config.output)
    recovers = track is None
    if track is None:
        runs.check_store(config.tracking.uri)
        track = runs.start
    loaded = cache = interruption = None
    status = "ok"
    try:
        with record.stage("load"), collector_paused():
            if config.backend.name == "plugin":
                status = _unavailable(record)
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


def _unavailable(record: Record) -> str:
    """Record why the attention plugin cannot run here; returns the report's status."""
    from passes.tensorrt.versions import load_stack
    from pipeline.record.environment import environment
    from pipeline.rivals.plugin import why_not

    stack = load_stack()
    record.report["environment"] = environment(stack.versions())
    reason = record.report["unavailable"] = why_not(record.config.backend, stack)
    record.note(f"unavailable: {reason}")
    return "unavailable"


def _load(record: Record) -> tuple[LoadedModel, torch.device, CacheShape | None]:
    """Weights, tokenizer, device, environment and the engines' KV cache; whatever the user got wrong must come to light
    here."""
    import torch

    from passes.tensorrt.versions import load_stack
    from pipeline.engine import programs
    from pipeline.model import load
    from pipeline.model.text import token_batch
    from pipeline.record.environment import environment
    from pipeline.store import reuse
    from pipeline.store.entries import Store

    config = record.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = load_stack().versions() if config.backend.name == "tensorrt" else None
    record.report["environment"] = environment(versions)
    loaded = load.load(config.model, config.precision, device, config.seed, record.update)
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
    cache = programs.cache_of(config, loaded) if config.backend.name == "tensorrt" else None
    if reuse.applies(config):
        Store.of(config.store)  # refuses a folder that cannot be written
    record.report["model"] = loaded.describe()
    record.detail = f"{loaded.parameters / 1e6:.0f} M parameters from {loaded.source}"
    return loaded, device, cache


def _tensorrt(record: Record, loaded: LoadedModel, device: torch.device, cache: CacheShape | None, turn: Turn) -> str:
    """export → … → build, or the same engines out of the store; then verify → benchmark; returns the status."""
    from passes.tensorrt.versions import load_stack
    from pipeline import building, judging
    from pipeline.engine.programs import assumed
    from pipeline.store import reuse
    from pipeline.verify import candidate

    config, report, stack = record.config, record.report, load_stack()
    with reuse.engine_of(record, loaded, device, stack) as place:
        built = None if place.restored else building.build(record, stack, loaded, cache, place.timing_cache)
        assert record.folder is not None
        conditions = assumed(report)
        if device.type == "cuda":
            with record.stage("verify"):
                what = candidate.engines(config, loaded, record.folder, cache, place.runtime_cache)
                judging.verify(record, loaded, what, conditions)
        elif built is None:
            place.take_over_verification()
        else:
            with record.stage("verify"):
                # Without a GPU no engine can run; what can be checked are the graphs that they were built from.
                judging.verify(record, loaded, candidate.graphs(config, loaded, built, cache), conditions)
        place.keep()
    if device.type != "cuda":
        return "not_executed"
    what.finished()
    judging.benchmark(record, loaded, what, turn)
    what.finished()
    return "ok"


def _rival(record: Record, loaded: LoadedModel, device: torch.device, turn: Turn) -> str:
    """verify → benchmark of eager PyTorch or torch.compile; without a GPU nothing is timed."""
    from pipeline import judging
    from pipeline.rivals.generation import rival_generator
    from pipeline.rivals.prompt import TorchRunner
    from pipeline.trace.call_form import CallForm
    from pipeline.verify.candidate import Machine

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
        judging.verify(record, loaded, what)
    judging.benchmark(record, loaded, what, turn)
    return "ok"
