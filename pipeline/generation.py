"""Generation in a run: what is judged token by token, and then timed, is the same prompt and the same generator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.generate.protocol import behind_caller
from pipeline.generate.with_cache import CachedGenerator
from pipeline.host import gpu
from pipeline.measure.generation import measure_generation
from pipeline.measure.roofline import DecoderCost
from pipeline.model.load import DTYPES, LoadedModel, load_reference
from pipeline.model.text import tokens_for
from pipeline.record.record import Record
from pipeline.verify import tokens
from pipeline.verify.arithmetic import Arithmetic, in_arithmetic
from pipeline.verify.cases import ragged_padding

if TYPE_CHECKING:
    from pipeline.generate.protocol import Generator
    from pipeline.measure.ceilings import Ceilings
    from pipeline.measure.until_settled import BenchmarkResult


def prompts(record: Record, loaded: LoadedModel) -> Tensor:
    """The prompts of ``benchmark.generate``, [batch, length] int64, on the model's device."""
    shape = record.config.benchmark.generate
    assert shape is not None
    return tokens_for(loaded, shape.batch, shape.input_length, record.config.seed)


def verify(record: Record, loaded: LoadedModel, generator: Generator, arithmetic: Arithmetic = nullcontext) -> None:
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
        precision_eps=torch.finfo(DTYPES[config.precision]).eps / 2,
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


def measure(
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
