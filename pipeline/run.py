"""One run, from its configuration to its report: the whole way, read top to bottom."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import UserError
from pipeline.config import Config, StrategyConfig
from pipeline.console import StageDisplay
from pipeline.memory import collector_paused, trim
from pipeline.record import Record, StopHere

if TYPE_CHECKING:
    import torch

    from passes.rewrite import Rewritten
    from pipeline.benchmark import Runner
    from pipeline.export import CallForm
    from pipeline.model import LoadedModel
    from pipeline.tracking import Tracked
    from pipeline.verify import Forward

QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Outcome:
    """``report`` is what report.json in ``folder`` says."""

    report: dict[str, Any]
    folder: Path


def run(config: Config, display: StageDisplay | None = None, track: Callable[..., Tracked] | None = None) -> Outcome:
    """Do what ``config`` says.  Raises :class:`passes.errors.UserError`, and then nothing was created; whatever
    goes wrong later is in the report.  Ctrl-C and SIGTERM are passed on, with the report written.

    ``track`` stands in for :func:`pipeline.tracking.start`, and the store is then not asked whether it is there.
    """
    from pipeline import tracking
    from pipeline.tracking_names import folder_name

    if config.cache.name != "none" or config.benchmark.generate is not None:
        raise UserError(f"cache={config.cache.name}: generation is not built yet; use cache=none benchmark=prefill")
    record = Record(config, display or StageDisplay())
    if track is None:
        tracking.check_store(config.tracking.uri)
        track = tracking.start
    loaded = interruption = None
    try:
        with record.stage("load"), collector_paused():
            loaded, device = _load(record)
    except UserError:
        raise
    except Exception as error:
        record.fail(error)
    gc.collect()
    trim()
    gc.freeze()  # a million objects of the libraries that the collector need not walk again and again
    folder = record.open_folder(folder_name(config))
    try:
        tracked = track(config, folder, environment=record.report["environment"])
    except BaseException:
        record.discard_folder()
        raise
    with tracked:
        status = "ok"
        try:
            if loaded is not None:
                status = _ENGINE_OR_RIVAL[config.backend.name](record, loaded, device)
        except StopHere:
            pass
        except Exception as error:
            record.fail(error)
        except BaseException as error:
            record.fail(error)
            interruption = error
        record.close(status)
        tracked.finish(record.report, folder)
    record.display.summary(record.report, folder, f"run {tracked.run_id}  ({tracked.where})")
    if interruption is not None:
        raise interruption
    return Outcome(record.report, folder)


def _load(record: Record) -> tuple[LoadedModel, torch.device]:
    """Weights, tokenizer, device and environment; whatever the user got wrong must come to light here."""
    import torch

    from passes.stack import load_stack
    from pipeline import model
    from pipeline.environment import environment
    from pipeline.text import token_batch

    config = record.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = load_stack().versions() if config.backend.name == "tensorrt" else None
    record.report["environment"] = environment(versions)
    loaded = model.load(config.model, config.precision, device, config.seed, record.display.update)
    described = loaded.model.config.get_text_config()
    limit = getattr(described, "max_position_embeddings", None)
    if limit is not None and config.shape.max > limit:
        raise UserError(f"shape.max={config.shape.max}: above max_position_embeddings={limit} of {loaded.source}")
    token_batch(loaded.tokenizer, described.vocab_size, 1, 1, config.seed)  # refuses a tokenizer of another model
    record.report["model"] = loaded.describe()
    record.detail = f"{loaded.parameters / 1e6:.0f} M parameters from {loaded.source}"
    return loaded, device


def _tensorrt(record: Record, loaded: LoadedModel, device: torch.device) -> str:
    """export → strategy → lower → interpret → build → verify → benchmark; returns the report's status."""
    from passes.rewrite import apply_strategy
    from passes.stack import load_stack
    from pipeline import compile, export
    from pipeline.engine import Engine, write_engine
    from pipeline.report import calls_table
    from pipeline.verify import widened

    config, report, stack = record.config, record.report, load_stack()
    form = export.CallForm(loaded.model, config.model.logits)

    with record.stage("export"), collector_paused():
        traced = export.trace(form, config.model, config.shape, device)
        record.keep("graph_before.txt", str(traced.program.graph))
        record.detail = f"{len(traced.program.graph.nodes)} nodes"

    with record.stage("strategy"):
        asked = config.strategy
        rewritten = apply_strategy(traced.program, asked.name, asked.unproven, asked.assume)
        report["attention"] = rewritten.describe()
        record.keep("graph_after.txt", str(rewritten.program.graph))
        record.keep("attention_calls.md", calls_table(report["attention"]["calls"]))
        record.detail = str(report["attention"]["summary"]["by_action"]).strip("{}").replace("'", "")
    for note in _dropped(rewritten, asked):
        record.note(note)

    with record.stage("lower"), collector_paused():
        lowered = compile.lower(stack, rewritten.program, traced.inputs, config.backend, config.precision)

    with record.stage("interpret"):
        network = compile.interpret(stack, lowered, use_upstream=config.strategy.name == "upstream")
        report["engine"] = network.contents

    with record.stage("build"):
        built = compile.build(stack, network, record.display.steps)
        report["engine"] = built.section
        assert record.folder is not None
        assumed, guard = rewritten.assumed, bool(asked.guard)
        write_engine(record.folder, built.data, built.section, traced.inputs, report["environment"], assumed, guard)
        record.detail = f"{built.section['bytes'] / 1e6:.0f} MB"
    del lowered, network
    gc.collect()
    trim()

    with record.stage("verify"):
        if device.type == "cuda":
            conditions = tuple(assumed) if guard else ()
            runner = Engine(stack, built.data, traced.inputs, bool(config.backend.cuda_graph), conditions)
            _verify(record, loaded, device, form, runner.unguarded, "engine", assumed)
        else:
            # Without a GPU the engine cannot run; what can be checked is the graph that it was built from.
            del built  # hundreds of megabytes, and on disk
            graph = widened(rewritten.program.module())
            _verify(record, loaded, device, form, lambda inputs: graph(**inputs), "graph", assumed)
    if device.type != "cuda":
        return "not_executed"
    _benchmark(record, loaded, runner)
    return "ok"


def _dropped(rewritten: Rewritten, strategy: StrategyConfig) -> Iterator[str]:
    """What the reader must know of masks that were dropped without a proof for every input."""
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


def _rival(record: Record, loaded: LoadedModel, device: torch.device) -> str:
    """verify → benchmark of eager PyTorch or torch.compile; without a GPU nothing is timed."""
    from pipeline.export import CallForm
    from pipeline.rivals import TorchRunner

    form = CallForm(loaded.model, record.config.model.logits)
    record.note(f"backend={record.config.backend.name} runs the model as it is: strategy has no part in this run")
    if device.type != "cuda":
        record.note("no GPU: nothing was run")
        return "not_executed"
    runner = TorchRunner(form, record.config.model.inputs, record.config.backend)
    with record.stage("verify"):
        _verify(record, loaded, device, form, runner, record.config.backend.name)
    _benchmark(record, loaded, runner)
    return "ok"


def _verify(
    record: Record,
    loaded: LoadedModel,
    device: torch.device,
    form: CallForm,
    candidate: Forward,
    executed: str,
    assumed: Collection[str] = (),
) -> None:
    """Judge ``candidate`` against wider PyTorch, let it answer a question, and end the run if it failed; then show
    what it does to inputs outside of what was ``assumed``, on which it is not judged."""
    import torch

    from pipeline import verify
    from pipeline.cases import Case, case_inputs, cases, split
    from pipeline.export import CallForm
    from pipeline.model import DTYPES, load_reference
    from pipeline.text import token_batch

    config = record.config
    names, vocabulary = config.model.inputs, loaded.model.config.get_text_config().vocab_size
    reference = CallForm(load_reference(config.model, config.precision, device, config.seed), config.model.logits)
    if executed == "graph":
        verify.widened_parameters(form)

    def inputs_of(case: Case) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        seed = config.seed + case.sample
        tokens = token_batch(loaded.tokenizer, vocabulary, config.shape.batch, case.length, seed).to(device)
        return case_inputs(case, names, tokens)

    def in_fp16_accumulation(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with verify.fp16_accumulation():
            return form(**inputs)

    yardsticks: dict[str, Forward] = {"pytorch": lambda inputs: form(**inputs)}
    if executed == "engine" and config.precision == "fp16":
        yardsticks["pytorch_fp16_accumulation"] = in_fp16_accumulation

    def judged(done: int, total: int) -> None:
        trim()
        record.display.steps("case", done, total)

    judge = partial(
        verify.judge,
        inputs_of=inputs_of,
        reference=lambda inputs: reference(**inputs),
        yardsticks=yardsticks,
        candidate=candidate,
        precision_eps=torch.finfo(DTYPES[config.precision]).eps / 2,
        progress=judged,
    )
    every = cases(config.verify, config.shape, names, config.model.logits)
    inside, outside = split(every, assumed, names, config.shape.batch)
    record.report["verify"] = {"executed": executed, "factor": verify.FACTOR, **judge(inside)}
    if loaded.tokenizer is not None and config.shape.kind == "dynamic" and config.shape.batch == 1:
        record.report["verify"]["answer"] = verify.answers(
            loaded.tokenizer, QUESTION, candidate, lambda inputs: form(**inputs), names, config.shape.max, device
        )
    record.detail = f"{len(inside)} cases on the {executed}"
    verify.gate(record.report["verify"])
    if outside:
        record.report["verify"]["outside"] = verify.cost(judge(outside)["cases"], assumed)


def _benchmark(record: Record, loaded: LoadedModel, runner: Runner) -> None:
    """Time what was verified; nothing else ever reaches this."""
    from pipeline import benchmark, gpu
    from pipeline.plots import latency_plot
    from pipeline.roofline import decoder_cost

    config = record.config
    if not config.benchmark.shapes:
        return
    with record.stage("benchmark"):
        cost = decoder_cost(loaded.model, config.model.logits)
        ceilings = gpu.measure_ceilings(config.precision)
        result = benchmark.measure(runner, config.benchmark, cost, ceilings, config.precision)
        record.report["benchmark"] = result.report
        record.keep_json("samples.json", result.samples)
        assert record.folder is not None
        latency_plot(result.samples, record.folder / "latency.png")


_ENGINE_OR_RIVAL: dict[str, Callable[[Record, LoadedModel, torch.device], str]] = {
    "tensorrt": _tensorrt,
    "eager": _rival,
    "torch_compile": _rival,
}
