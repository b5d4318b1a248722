"""The ``benchmark`` stage: prompts first, then the generation, on the tokens that the verification judged."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config.schema import BenchmarkConfig
from pipeline.host import gpu
from pipeline.measure import ceilings, prompt
from pipeline.measure.generation import measure_generation
from pipeline.measure.roofline import decoder_cost, with_few_bits
from pipeline.measure.until_settled import BenchmarkResult
from pipeline.model.text import tokens_for

if TYPE_CHECKING:
    from pipeline.engine.session import Held
    from pipeline.generate.protocol import Generator
    from pipeline.measure.clock import Clock
    from pipeline.measure.prompt import Runner
    from pipeline.model.load import LoadedModel


def measure(
    runner: Runner,
    generator: Generator | None,
    loaded: LoadedModel,
    asked: BenchmarkConfig,
    *,
    logits: str,
    precision: str,
    seed: int,
    cached: bool,
    waiting: Collection[int],
    clock: Clock | None = None,
    few_bits: tuple[bool, bool] = (True, True),
    held: Callable[[], Held] | None = None,
    context_bytes: int | None = None,
) -> Iterator[BenchmarkResult]:
    """Time what was verified, and yield what is known after each of the two.

    ``logits``: ``last`` or ``all``, those that a prompt gives.  ``cached``: a step of ``generator`` reads a cache.
    ``few_bits``: whether quantised weights are so in the engine of prompts, and in that of steps.
    ``waiting``: ids of processes that are known to launch nothing.  ``clock``: for a device other than the GPU.
    ``held``: of engines, which have weights of their own; the model gives up its, for good.  None: it is the model that
    is timed.  ``context_bytes``: of the device's memory, before the model was loaded.
    """

    def told(result: BenchmarkResult) -> BenchmarkResult:
        memory, engines = result.benchmark.memory, {} if held is None else asdict(held())
        if memory is not None:
            memory = replace(memory, context_bytes=context_bytes, **engines)
        return replace(result, benchmark=replace(result.benchmark, memory=memory, tokens=kind))

    cost = with_few_bits(decoder_cost(loaded.model, logits), loaded.model, loaded.quantised, *few_bits)
    read_state = partial(gpu.read_state, waiting)
    kind = "real text" if loaded.tokenizer is not None else "random, seeded"
    tokens = partial(tokens_for, loaded, seed=seed, device=loaded.model.device)
    if held is not None:
        loaded.model.to("meta")
    gc.collect()
    gpu.give_back()  # what the verification took
    roof = ceilings.measure(precision) if clock is None else None
    result = prompt.measure(runner, asked, tokens, cost, roof, precision, clock, read_state)
    if asked.shapes:
        yield told(result)
    if generator is not None and (shape := asked.generate) is not None:
        prompts = tokens(shape.batch, shape.input_length)
        later = measure_generation(generator, asked, prompts, cached, cost, roof, precision, clock, read_state)
        yield told(result.joined(later))
