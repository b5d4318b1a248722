"""The ``verify`` stage: what was built is judged before anything is timed.

Of a generation, what is judged token by token is the generator that will be timed, with the prompts that it will be
timed on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes.precision import PRECISIONS
from pipeline.config.schema import GenerateShape, ModelConfig
from pipeline.config.verification import VerifyConfig
from pipeline.generate.protocol import behind_caller
from pipeline.generate.with_cache import CachedGenerator
from pipeline.host import gpu
from pipeline.host.memory import trim
from pipeline.model import few_bits
from pipeline.model.load import LoadedModel, load_reference
from pipeline.model.text import tokens_for
from pipeline.trace.call_form import CallForm
from pipeline.verify import arithmetic, logits, tokens
from pipeline.verify.arithmetic import Arithmetic, in_arithmetic
from pipeline.verify.cases import case_inputs, cases, ragged_padding, split
from pipeline.verify.sections import Case, Generation, JudgedCase, Verification

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.generate.protocol import Generator
    from pipeline.verify.candidate import Machine

QUESTION = "What is the capital of France?"


def verify(
    what: Machine,
    loaded: LoadedModel,
    form: ModelConfig,
    asked: VerifyConfig,
    *,
    precision: str,
    seed: int,
    flavour: str | None,
    generate: GenerateShape | None,
    assumed: Collection[str],
    progress: Callable[[str, int, int], object],
) -> Iterator[Verification]:
    """Judge ``what`` and yield what is known after each step: its logits against wider PyTorch, with its answer to a
    question; the tokens that it generates; and its logits on inputs outside of what was ``assumed``, on which it is not
    judged.  Hand each to :func:`gate` before the next step: after one that failed there is none.

    ``flavour``: of TensorRT, where it is an engine.  ``generate``: the generation that will be timed.
    """
    device, batch = loaded.model.device, what.shape.batch
    own_form = CallForm(loaded.model, form.logits)
    same = replace(form, revision=loaded.revision)  # a branch may have moved since
    wide = load_reference(same, precision, device, seed)
    few_bits.put(wide, loaded.quantised)  # of these the engine is made; what they cost is another question
    reference = CallForm(wide, form.logits)
    computing = (what.executed, precision, flavour)
    arithmetics = arithmetic.yardsticks(*computing)

    def inputs_of(case: Case) -> tuple[dict[str, Tensor], Tensor | None]:
        return case_inputs(case, form.inputs, tokens_for(loaded, batch, case.length, seed + case.sample))

    def own(inputs: dict[str, Tensor]) -> Tensor:
        return own_form(**inputs)

    def judged(done: int, total: int) -> None:
        trim()
        progress("case", done, total)

    yardsticks = {name: in_arithmetic(own, each) for name, each in arithmetics.items()}
    judge: Callable[[list[Case]], tuple[JudgedCase, ...]] = partial(
        logits.judge,
        inputs_of=inputs_of,
        reference=lambda inputs: reference(**inputs),
        yardsticks=yardsticks,
        candidate=what.forward,
        precision_eps=PRECISIONS[precision].unit_roundoff,
        progress=judged,
    )
    ragged = what.longest > 0 and batch > 1  # a cache's rows are at places of their own
    kernels = what.executed != "graph"
    every = cases(asked, what.shape, form.inputs, form.logits, what.longest, what.exact, ragged, kernels, what.chunk)
    inside, outside = split(every, assumed, form.inputs, batch)
    found = judge(inside)
    answer = None
    if loaded.tokenizer is not None and what.shape.kind == "dynamic" and batch == 1:
        answer = logits.answers(
            loaded.tokenizer, QUESTION, what.forward, yardsticks["pytorch"], form.inputs, what.shape.max, device
        )
    verification = Verification(
        executed=what.executed,
        arithmetic=arithmetic.described(*computing),
        factor=logits.FACTOR,
        cases=found,
        passed=what.generator is None and all(case.passed for case in found),
        answer=answer,
    )
    yield verification
    if what.generator is not None:
        assert generate is not None
        judge_of = list(arithmetics.values())[-1]
        generation = judge_generation(what.generator, loaded, wide, generate, precision, seed, judge_of)
        passed = generation.passed and all(case.passed for case in found)
        verification = replace(verification, generation=generation, passed=passed)
        yield verification
    if outside:
        yield replace(verification, outside=logits.outside(judge(outside), assumed))


def gate(verification: Verification) -> None:
    """Raises :class:`passes.errors.RunError` of kind ``accuracy`` where something that is judged did not pass."""
    logits.gate(verification.cases)
    if verification.generation is not None:
        tokens.gate(verification.generation.cases)


def notes(executed: str, precision: str, flavour: str | None) -> list[str]:
    """What the reader must know of how such a candidate is judged."""
    if "pytorch_tf32" not in arithmetic.yardsticks(executed, precision, flavour):
        return []
    return ["TensorRT-RTX multiplies fp32 in TF32, whatever the builder's flag: judged by PyTorch in TF32"]


def judge_generation(
    generator: Generator,
    loaded: LoadedModel,
    wide: PreTrainedModel,
    shape: GenerateShape,
    precision: str,
    seed: int,
    arithmetic: Arithmetic = nullcontext,
) -> Generation:
    """Judge the very generation that will be timed, token by token, in PyTorch's ``arithmetic`` beside ``wide``, the
    model one type wider."""
    prompt = tokens_for(loaded, shape.batch, shape.input_length, seed)
    free = gpu.free_bytes()
    try:
        generator.prepare(prompt, shape.output_length)
    except torch.OutOfMemoryError as error:
        raise gpu.out_of_memory(error, free) from error
    own, reference = (tokens.last_positions(model, shape.output_length) for model in (loaded.model, wide))
    judge = partial(
        tokens.judge_generation,
        prompt,
        forward=in_arithmetic(own, arithmetic),
        reference=reference,
        vocabulary=loaded.model.config.get_text_config().vocab_size,
        precision_eps=PRECISIONS[precision].unit_roundoff,
    )
    name = f"generation_{shape.input_length}_{shape.output_length}"
    judged = [judge(generator.tokens(), None, name=name)]
    if isinstance(generator, CachedGenerator) and shape.batch > 1:  # rows at places of their own
        padding = ragged_padding(*prompt.shape).to(prompt.device)
        again = _again(generator, prompt, shape.output_length, padding)
        judged.append(judge(again, padding, name=f"{name}_ragged"))
    return Generation(tuple(judged), all(case.passed for case in judged))


def _again(generator: CachedGenerator, prompt: Tensor, new_tokens: int, padding: Tensor) -> Tensor:
    """What it generates after other prompts of the shape that it is prepared for, whose ``padding`` is ignored."""
    generator.prepare(prompt, new_tokens, padding)
    with behind_caller(generator.stream):
        generator.prefill()
        for _ in range(new_tokens - 1):
            generator.decode()
    return generator.tokens()
