"""verify → benchmark: what was built is judged, and only then timed.

Of a generation, what is judged token by token and then timed is the same prompt and the same generator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes.precision import PRECISIONS
from pipeline.generate.protocol import behind_caller
from pipeline.generate.with_cache import CachedGenerator
from pipeline.host import gpu
from pipeline.host.memory import trim
from pipeline.host.turn import Turn
from pipeline.measure import ceilings, prompt
from pipeline.measure.generation import measure_generation
from pipeline.measure.roofline import DecoderCost, decoder_cost
from pipeline.model.load import LoadedModel, load_reference
from pipeline.model.text import tokens_for
from pipeline.record.plots import latency_plot
from pipeline.record.record import Record
from pipeline.trace.call_form import CallForm
from pipeline.verify import arithmetic, logits, tokens
from pipeline.verify.arithmetic import Arithmetic, in_arithmetic
from pipeline.verify.cases import Case, case_inputs, cases, ragged_padding, split

if TYPE_CHECKING:
    from pipeline.generate.protocol import Generator
    from pipeline.measure.ceilings import Ceilings
    from pipeline.measure.until_settled import BenchmarkResult
    from pipeline.verify.candidate import Machine


QUESTION = "What is the capital of France?"


def verify(record: Record, loaded: LoadedModel, what: Machine, assumed: Collection[str] = ()) -> None:
    """Judge ``what`` against wider PyTorch, let it answer a question, judge what it generates, and end the run if it
    failed; then show what it does to inputs outside of what was ``assumed``, on which it is not judged."""
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
        logits.judge,
        inputs_of=inputs_of,
        reference=lambda inputs: reference(**inputs),
        yardsticks=yardsticks,
        candidate=what.forward,
        precision_eps=PRECISIONS[config.precision].unit_roundoff,
        progress=judged,
    )
    lengths = replace(config.shape, min=1) if config.runs_at_one_length else config.shape
    ragged = what.longest > 0 and config.shape.batch > 1  # a cache's rows are at places of their own
    kernels = what.executed != "graph"
    every = cases(config.verify, lengths, names, config.model.logits, what.longest, what.exact, ragged, kernels)
    inside, outside = split(every, assumed, names, config.shape.batch)
    described = {"executed": what.executed, "arithmetic": arithmetic.described(*computing), "factor": logits.FACTOR}
    record.report["verify"] = {**described, **judge(inside)}
    if loaded.tokenizer is not None and config.shape.kind == "dynamic" and config.shape.batch == 1:
        record.report["verify"]["answer"] = logits.answers(
            loaded.tokenizer, QUESTION, what.forward, yardsticks["pytorch"], names, config.shape.max, device
        )
    record.detail = f"{len(inside)} cases on the {what.executed}"
    logits.gate(record.report["verify"])
    if what.generator is not None:
        verify_generation(record, loaded, what.generator, list(arithmetics.values())[-1])
    if outside:
        record.report["verify"]["outside"] = logits.cost(judge(outside)["cases"], assumed)


def benchmark(record: Record, loaded: LoadedModel, what: Machine, turn: Turn) -> None:
    """Time what was verified; nothing else ever reaches this."""
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
        result = prompt.measure(
            what.runner, config.benchmark, tokens, cost, roof, config.precision, read_state=read_state
        )
        if what.generator is not None:
            result = result.joined(_measure_generation(record, loaded, what.generator, cost, roof, read_state))
        result.report["tokens"] = "real text" if loaded.tokenizer is not None else "random, seeded"
        record.report["benchmark"] = result.report
        record.keep_json("samples.json", result.samples)
        assert record.folder is not None
        latency_plot(result.samples, record.folder / "latency.png")


def prompts(record: Record, loaded: LoadedModel) -> Tensor:
    """The prompts of ``benchmark.generate``, [batch, length] int64, on the model's device."""
    shape = record.config.benchmark.generate
    assert shape is not None
    return tokens_for(loaded, shape.batch, shape.input_length, record.config.seed)


def verify_generation(
    record: Record, loaded: LoadedModel, generator: Generator, arithmetic: Arithmetic = nullcontext
) -> None:
    """Judge the very generation that will be timed and end the run if one token of it is wrong.

    ``arithmetic``: in which PyTorch judges it, see :mod:`pipeline.verify.arithmetic`.  Adds ``verify.generation`` to
    the report, in which ``verify`` must stand already.
    """
    config, shape = record.config, record.config.benchmark.generate
    assert shape is not None
    prompt = prompts(record, loaded)
    free = gpu.free_bytes()
    try:
        generator.prepare(prompt, shape.output_length)
    except torch.OutOfMemoryError as error:
        raise gpu.out_of_memory(error, free) from error
    reference = load_reference(config.model, config.precision, loaded.model.device, config.seed)
    own, wide = (tokens.last_positions(m, shape.output_length) for m in (loaded.model, reference))

    judge = partial(
        tokens.judge_generation,
        prompt,
        forward=in_arithmetic(own, arithmetic),
        reference=wide,
        vocabulary=loaded.model.config.get_text_config().vocab_size,
        precision_eps=PRECISIONS[config.precision].unit_roundoff,
    )
    verified, name = record.report["verify"], f"generation_{shape.input_length}_{shape.output_length}"
    before, verified["passed"] = verified["passed"], False  # until it is judged
    cases = [judge(generator.tokens(), None, name=name)]
    if isinstance(generator, CachedGenerator) and shape.batch > 1:  # rows at places of their own
        padding = ragged_padding(*prompt.shape).to(prompt.device)
        cases.append(judge(_again(generator, prompt, shape.output_length, padding), padding, name=f"{name}_ragged"))
    verified["generation"] = tokens.section(cases)
    verified["passed"] = before and verified["generation"]["passed"]
    record.detail += f", {sum(case.tokens for case in cases)} generated tokens"
    tokens.gate(verified["generation"])


def _again(generator: CachedGenerator, prompt: Tensor, new_tokens: int, padding: Tensor) -> Tensor:
    """What it generates after other prompts of the shape that it is prepared for, whose ``padding`` is ignored."""
    generator.prepare(prompt, new_tokens, padding)
    with behind_caller(generator.stream):
        generator.prefill()
        for _ in range(new_tokens - 1):
            generator.decode()
    return generator.tokens()


def _measure_generation(
    record: Record,
    loaded: LoadedModel,
    generator: Generator,
    cost: DecoderCost | None,
    ceilings: Ceilings | None,
    read_state: Callable[[], gpu.GpuState],
) -> BenchmarkResult:
    """Time it; see :func:`pipeline.measure.generation.measure_generation`."""
    config = record.config
    prompt, cached = prompts(record, loaded), config.cache.name != "none"
    return measure_generation(
        generator, config.benchmark, prompt, cached, cost, ceilings, config.precision, read_state=read_state
    )
