"""Engines on the GPU against PyTorch: every strategy, both kinds of shape, padding, CUDA graphs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from conftest import model_config
from torch import Tensor

from passes.errors import RunError, UserError
from passes.graph.rewrite import rewrite
from passes.precision import PRECISIONS
from passes.tensorrt.versions import load_stack
from pipeline.config.schema import BackendConfig, ShapeConfig
from pipeline.engine import network as compile
from pipeline.engine.build import build_engine
from pipeline.engine.runner import Engine
from pipeline.generate.greedy import answer, chat_tokens, greedy
from pipeline.generate.without_cache import PrefixGenerator
from pipeline.model.load import load, load_reference
from pipeline.trace.call_form import CallForm, InputSpec, Traced, trace
from pipeline.verify import arithmetic
from pipeline.verify import logits as verify
from pipeline.verify.cases import Case, case_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that TensorRT can run on"),
]

LONGEST = 1024
LENGTHS = (2, 7, 511, 512, 513, LONGEST)
PADDED = ("input_ids", "attention_mask")
# Heads of 64, and weights that spread the scores over several units: a lost scale or mask changes every logit.
SHARP: dict[str, Any] = {"head_dim": 64, "initializer_range": 0.2}
STRATEGIES = [
    ("detect_causal", "mask"), ("mask_input", None), ("lowering", "keep"), ("decompose", None), ("upstream", None),
]  # fmt: skip


def build(
    strategy: str, unproven: str | None, precision: str = "fp16", name: str = "llama", *,
    inputs: tuple[str, ...] = ("input_ids",), batch: int = 1, lengths: tuple[int, int] = (2, LONGEST),
    cuda_graph: bool = False, assume: tuple[str, ...] = (), exact: tuple[int, ...] = (), **changes: Any,
) -> Engine:  # fmt: skip
    traced = tiny.traced(name, precision, inputs, batch, lengths, torch.device("cuda"), exact, **changes)
    return engine_of(traced, precision, strategy, unproven, cuda_graph, assume)


def engine_of(
    traced: Traced, precision: str, strategy: str = "detect_causal", unproven: str | None = "mask",
    cuda_graph: bool = False, assume: tuple[str, ...] = (),
) -> Engine:  # fmt: skip
    stack = load_stack()
    rewritten = rewrite(traced.program, strategy, unproven, assume)
    lowered = compile.lower(stack, rewritten.program, traced.inputs, BackendConfig("tensorrt"), precision)
    network = compile.interpret(stack, lowered, compile.UPSTREAM if strategy == "upstream" else compile.ours())
    data, conditions = build_engine(stack, network, lambda *_: True).data, tuple(rewritten.assumed)
    return Engine(stack, data, traced.inputs, cuda_graph, conditions)


@functools.cache
def reference(name: str, precision: str, changes: tiny.Changes) -> CallForm:
    return CallForm(load_reference(tiny.config(name, **dict(changes)), precision, torch.device("cuda"), 0), "all")


def judged(
    engine: Engine, precision: str, lengths: tuple[int, ...], padding: str = "none", name: str = "llama", **changes: Any
) -> dict[str, Any]:
    """The pipeline's own verification of ``engine`` at ``lengths``."""
    names, batch = [spec.name for spec in engine.inputs], engine.inputs[0].batch
    form = CallForm(tiny.model(name, precision, torch.device("cuda"), **changes), "all")

    def inputs_of(case: Case) -> tuple[dict[str, Tensor], Tensor | None]:
        return case_inputs(case, names, tiny.tokens(batch, case.length).cuda())

    def own(inputs: dict[str, Tensor]) -> Tensor:
        return form(**inputs)

    arithmetics = arithmetic.yardsticks("engine", precision, load_stack().flavour)
    return verify.judge(
        [Case(f"length_{length}", length, padding, 0) for length in lengths],
        inputs_of,
        reference=lambda inputs: reference(name, precision, tuple(sorted(changes.items())))(**inputs),
        yardsticks={name: arithmetic.in_arithmetic(own, each) for name, each in arithmetics.items()},
        candidate=engine,
        precision_eps=PRECISIONS[precision].unit_roundoff,
        progress=lambda done, total: None,
    )


@pytest.mark.parametrize(("strategy", "unproven"), STRATEGIES)
def test_a_dynamic_engine_equals_pytorch_over_its_whole_profile(strategy: str, unproven: str | None) -> None:
    verify.gate(judged(build(strategy, unproven, **SHARP), "fp16", LENGTHS, **SHARP))


@pytest.mark.parametrize(("strategy", "unproven"), STRATEGIES)
def test_a_static_engine_equals_pytorch(strategy: str, unproven: str | None) -> None:
    verify.gate(judged(build(strategy, unproven, lengths=(513, 513), **SHARP), "fp16", (513,), **SHARP))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_other_precisions_equal_pytorch(precision: str) -> None:
    verify.gate(judged(build("detect_causal", "mask", precision, **SHARP), precision, LENGTHS, **SHARP))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3"])
def test_biases_norms_and_fused_projections_equal_pytorch(name: str) -> None:
    changes = {"initializer_range": 0.2}
    engine = build("detect_causal", "mask", name=name, **changes)
    verify.gate(judged(engine, "fp16", LENGTHS, name=name, **changes))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("width", [6, 150, 600, 1100])  # the last is so wide that its blocks shrink
def test_a_window_in_blocks_equals_pytorch_below_at_and_above_it(width: int, static: bool) -> None:
    longest = 1500 if width > 1000 else LONGEST
    changes = {"sliding_window": width, **SHARP}
    lengths = (longest, longest) if static else (2, longest)
    engine = build("detect_causal", "mask", name="mistral", batch=2, lengths=lengths, **changes)
    at = (longest,) if static else (2, 7, width, width + 1, 2 * width, longest)
    verify.gate(judged(engine, "fp16", tuple(n for n in at if n <= longest), name="mistral", **changes))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("strategy", "unproven"), [("detect_causal", "mask"), ("detect_causal", "decompose")])
def test_padding_is_respected_in_a_batch(strategy: str, unproven: str, padding: str) -> None:
    engine = build(strategy, unproven, inputs=PADDED, batch=2, **SHARP)
    verify.gate(judged(engine, "fp16", (7, 513), padding, **SHARP))


def test_a_mask_that_was_dropped_by_force_fails_the_verification() -> None:
    engine = build("lowering", "force", inputs=PADDED, batch=2, **SHARP)
    verify.gate(judged(engine, "fp16", (7, 513), "none", **SHARP))
    with pytest.raises(RunError, match="cases failed") as error:
        verify.gate(judged(engine, "fp16", (7, 513), "left", **SHARP))
    assert error.value.kind == "accuracy"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build("detect_causal", "mask", **SHARP)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, LONGEST + 1), (2, 7)])
def test_a_shape_outside_the_profile_is_refused_and_the_engine_lives_on(
    engine: Engine, batch: int, length: int
) -> None:
    right = engine({"input_ids": tiny.tokens(1, 7).cuda()})
    with pytest.raises(UserError, match=f"length 2..{LONGEST}"):
        engine({"input_ids": tiny.tokens(batch, length).cuda()})
    assert torch.equal(engine({"input_ids": tiny.tokens(1, 7).cuda()}), right)


EXACT = (7, 512, LONGEST)


@pytest.fixture(scope="module")
def with_exact() -> Engine:
    return build("detect_causal", "mask", exact=EXACT, **SHARP)


def profile_of(engine: Engine) -> int:
    return int(engine.session._context.active_optimization_profile)


def test_the_engine_has_the_profiles_that_were_asked_for(with_exact: Engine) -> None:
    made = with_exact.session._engine
    ranges = [
        [tuple(shape) for shape in made.get_tensor_profile_shape("input_ids", i)]
        for i in range(made.num_optimization_profiles)
    ]
    assert ranges == [[(1, 2), (1, LONGEST), (1, LONGEST)], *([(1, n)] * 3 for n in EXACT)]


def test_every_profile_equals_pytorch_forth_and_back(with_exact: Engine) -> None:
    there_and_back = (*LENGTHS, *reversed(LENGTHS), LONGEST, 7, LONGEST - 1, LONGEST)
    for length in there_and_back:
        verify.gate(judged(with_exact, "fp16", (length,), **SHARP))
        assert profile_of(with_exact) == (EXACT.index(length) + 1 if length in EXACT else 0)


@pytest.mark.parametrize("length", EXACT)
def test_an_exact_profile_gives_what_the_range_gives(length: int, with_exact: Engine, engine: Engine) -> None:
    inputs = {"input_ids": tiny.tokens(1, length).cuda()}
    own, ranged = with_exact(inputs), engine(inputs)
    assert (profile_of(with_exact), profile_of(engine)) == (EXACT.index(length) + 1, 0)
    assert not own.isnan().any()
    assert (own - ranged).float().norm() <= 5e-2 * ranged.float().norm()  # other kernels, the same function
    assert torch.equal(with_exact(inputs), own)
    with_exact({"input_ids": tiny.tokens(1, length - 1).cuda()})
    assert profile_of(with_exact) == 0
    assert torch.equal(with_exact(inputs), own), "back in its profile"


@pytest.mark.parametrize("length", [1, LONGEST + 1])
def test_outside_of_the_range_an_engine_with_exact_profiles_refuses_and_lives_on(
    length: int, with_exact: Engine
) -> None:
    inputs = {"input_ids": tiny.tokens(1, LONGEST).cuda()}
    right = with_exact(inputs)
    with pytest.raises(UserError, match=f"length 2..{LONGEST}"):
        with_exact({"input_ids": tiny.tokens(1, length).cuda()})
    assert torch.equal(with_exact(inputs), right)


def test_two_contexts_of_one_engine_run_by_the_same_exact_profile(with_exact: Engine) -> None:
    inputs = {"input_ids": tiny.tokens(1, 512).cuda()}
    right = with_exact(inputs)
    twin = with_exact.session.twin(specialise=False)
    (output,) = twin.outputs
    logits = torch.full_like(right, float("nan"))
    twin.bind({"input_ids": inputs["input_ids"], output: logits})
    torch.cuda.synchronize()
    twin.run(with_exact.stream)
    torch.cuda.synchronize()

    assert (logits - right).float().norm() <= 5e-2 * right.float().norm()
    assert torch.equal(with_exact(inputs), right)


def test_the_prefix_of_a_generation_grows_over_an_exact_length() -> None:
    device = torch.device("cuda")
    form = CallForm(tiny.model("llama", "fp16", device, **SHARP), "last")
    config = tiny.config("llama", **SHARP)
    engine = engine_of(trace(form, config, ShapeConfig("dynamic", 1, 2, 64, 64, exact=[16, 20]), device), "fp16")
    session = engine.session.twin(specialise=False)
    generator = PrefixGenerator(session, 128, session.dtype(session.outputs[0]), device)
    prompt = tiny.tokens(1, 14).cuda()
    generator.prepare(prompt, 10)
    made = torch.cat([prompt, generator.tokens()], 1)

    assert made.shape == (1, 24)
    for length in range(14, 24):  # each bound anew
        logits = engine({"input_ids": made[:, :length]})[0, -1].float()
        assert logits.max() - logits[made[0, length]] <= 5e-2 * logits.abs().max(), length


def test_padding_is_respected_at_an_exact_length() -> None:
    engine = build("detect_causal", "mask", inputs=PADDED, batch=2, exact=(513,), **SHARP)
    for padding in ("left", "right", "none"):
        verify.gate(judged(engine, "fp16", (7, 513, 512), padding, **SHARP))


def test_new_tokens_of_the_same_shape_are_not_answered_from_the_buffers(engine: Engine) -> None:
    first, second = (engine({"input_ids": tiny.tokens(1, 7, seed).cuda()}) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(engine({"input_ids": tiny.tokens(1, 7, 0).cuda()}), first)


@pytest.mark.parametrize("lengths", [(513, 513), (2, LONGEST)], ids=["static", "dynamic"])
def test_a_captured_graph_replays_the_engine_or_says_that_it_cannot(lengths: tuple[int, int]) -> None:
    plain = build("detect_causal", "mask", lengths=lengths, **SHARP)
    captured = build("detect_causal", "mask", lengths=lengths, cuda_graph=True, **SHARP)
    for seed in (0, 1):
        inputs = {"input_ids": tiny.tokens(1, 513, seed).cuda()}
        try:
            got = captured(inputs)
        except RunError as error:
            assert error.kind == "cuda_graph" and "captured" in str(error)
            return
        torch.testing.assert_close(got, plain(inputs))


@pytest.mark.parametrize("lengths", [(513, 513), (2, LONGEST)], ids=["static", "dynamic"])
def test_an_engine_that_assumes_no_padding_takes_the_mask_that_it_no_longer_reads_and_refuses_padding(
    lengths: tuple[int, int],
) -> None:
    engine = build("detect_causal", "mask", inputs=PADDED, lengths=lengths, assume=("no_padding",), **SHARP)
    assert engine.conditions == ("no_padding",)
    assert all(case.passed for case in judged(engine, "fp16", (513,), **SHARP))
    padded, _ = case_inputs(Case("", 513, "left", 0), list(PADDED), tiny.tokens(1, 513).cuda())
    with pytest.raises(RunError, match="attention_mask is 0 at row 0, token 0"):
        engine(padded)
    full = padded | {"attention_mask": torch.ones_like(padded["attention_mask"])}
    assert torch.equal(engine.unguarded(padded), engine(full))


def test_the_default_model_answers_as_pytorch_does() -> None:
    stack, device = load_stack(), torch.device("cuda")
    config = model_config("smollm2_135m")
    loaded = load(config, "fp16", device, 0, lambda _: None)
    form = CallForm(loaded.model, "all")
    traced = trace(form, config, ShapeConfig("dynamic", 1, 2, 256, 256), device)
    program = rewrite(traced.program, "detect_causal", "mask").program
    lowered = compile.lower(stack, program, traced.inputs, BackendConfig("tensorrt"), "fp16")
    built = build_engine(stack, compile.interpret(stack, lowered, compile.ours()), lambda *_: True)
    assert built.engine.iattention_causal == 30
    engine = Engine(stack, built.data, traced.inputs)

    assert loaded.tokenizer is not None
    question = "What is the capital of France?"
    prompt = chat_tokens(loaded.tokenizer, question).to(device)
    stop = frozenset({loaded.tokenizer.eos_token_id})
    with torch.no_grad():
        own = list(greedy(lambda inputs: form(**inputs), ["input_ids"], prompt, 24, stop, 256))
    assert list(greedy(engine, ["input_ids"], prompt, 24, stop, 256)) == own
    assert (
        answer(engine, loaded.tokenizer, question, 24) == loaded.tokenizer.decode(own, skip_special_tokens=True).strip()
    )
    assert "Paris" in answer(engine, loaded.tokenizer, question, 24)


def test_a_static_engine_cannot_answer() -> None:
    engine = build("detect_causal", "mask", lengths=(513, 513), **SHARP)
    assert engine.inputs == (InputSpec("input_ids", 1, 513, 513, 513),)
    with pytest.raises(UserError, match="dynamic length"):
        answer(engine, None, "?")  # type: ignore[arg-type]
