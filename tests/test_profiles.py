"""Optimization profiles: what the builder is given, which one a session runs by, and what is verified of each."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import torch
from torch import Tensor

from passes.errors import UserError
from passes.graph.rewrite import rewrite
from passes.private.of_torch_tensorrt import builder_config
from passes.tensorrt.versions import Stack, load_stack
from pipeline.__main__ import compose_config
from pipeline.config.schema import BackendConfig, CacheConfig, ShapeConfig
from pipeline.config.verification import VerifyConfig
from pipeline.engine import network as compile
from pipeline.engine import profiles
from pipeline.engine.build import build_engine
from pipeline.engine.network import Network
from pipeline.engine.session import GraphSession, Session
from pipeline.generate.with_cache import CachedGenerator
from pipeline.trace import cached_forms
from pipeline.trace.cache_shape import cache_shape
from pipeline.trace.call_form import InputSpec, Traced
from pipeline.verify import candidate
from pipeline.verify.cases import cases

SLOW = pytest.mark.slow

# What is built


def lowered(traced: Traced) -> compile.Lowered:
    program = rewrite(traced.program, "detect_causal", "mask").program
    return compile.lower(load_stack(), program, traced.inputs, BackendConfig("tensorrt"), "fp16")


def network(traced: Traced, in_place: bool = False) -> Network:
    return compile.interpret(load_stack(), lowered(traced), compile.ours(in_place))


def test_every_exact_length_is_a_profile_of_each_open_input() -> None:
    made = network(tiny.traced("llama", "fp16", ("input_ids", "attention_mask"), 2, exact=(16, 33)))
    every = made.interpreter.optimization_profiles
    assert builder_config(made.interpreter).num_optimization_profiles == len(every) == 3 and all(every)
    for profile, lengths in zip(every, ((1, 64, 64), (16,) * 3, (33,) * 3), strict=True):
        for name in ("input_ids", "attention_mask"):
            assert [tuple(shape) for shape in profile.get_shape(name)] == [(2, length) for length in lengths]
        assert profiles.lengths(made.interpreter.ctx.net, profile) == lengths


def test_the_engine_holds_kernels_of_every_profile() -> None:
    once, built = lowered(tiny.traced("llama", "fp16")), []
    for exact in ((), (16,), (16, 33)):
        asked = tuple(dataclasses.replace(spec, exact=exact) for spec in once.inputs)
        copied = dataclasses.replace(once, graph=copy.deepcopy(once.graph), inputs=asked)
        made = compile.interpret(load_stack(), copied, compile.ours())
        built.append(build_engine(load_stack(), made, lambda *_: True).engine)

    whole, short, long = (1, 64, 64), (16,) * 3, (33,) * 3
    assert [engine.profiles for engine in built] == [(whole,), (whole, short), (whole, short, long)]
    assert built[0].bytes < built[1].bytes < built[2].bytes


def test_a_static_engine_has_no_profiles() -> None:
    made = network(tiny.traced("llama", "fp16", lengths=(12, 12)))
    assert build_engine(load_stack(), made, lambda *_: True).engine.profiles == ()


@pytest.mark.parametrize(
    ("mode", "batch"),
    [
        pytest.param("static", 1, marks=SLOW),
        pytest.param("in_engine", 1, marks=SLOW),
        pytest.param("in_engine", 2, marks=SLOW),
    ],
)
def test_the_prompts_of_a_cache_have_them_too_and_the_step_has_none(mode: str, batch: int) -> None:
    model = tiny.model("llama", "fp16")
    shape = ShapeConfig("dynamic", batch, 2, 48, 48, exact=[32, 48])
    cache = cache_shape(model, CacheConfig(mode), shape, 60)
    form = cached_forms.PrefillForm(model, cache)
    prefill = network(cached_forms.trace_prefill(form, cache, shape, tiny.CPU), in_place=mode == "in_engine")
    step = cached_forms.trace_decode(cached_forms.DecodeForm(model, cache), cache, tiny.CPU)

    engine = build_engine(load_stack(), prefill, lambda *_: True).engine
    assert engine.profiles == ((2, 48, 48), (32,) * 3, (48,) * 3)
    assert {spec.exact for spec in step.inputs} == {()}


def test_a_manifest_gives_the_inputs_back_and_an_older_one_had_no_exact_lengths() -> None:
    for spec in (InputSpec("input_ids", 1, 2, 64, 64, exact=(16, 64)), InputSpec("last", 2, 1, 1, 1, sizes=(2,))):
        described = json.loads(json.dumps(dataclasses.asdict(spec) | {"shape": ["batch", "length"]}))
        assert InputSpec.of(described) == spec
        assert InputSpec.of({k: v for k, v in described.items() if k != "exact"}) == dataclasses.replace(spec, exact=())


# What a session runs by: TensorRT's rules, where no engine can be loaded


class FakeContext:
    """An execution context whose profile can be chosen before anything else is done with it."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert not self.shapes and not self.addresses
        self.profile = profile
        return profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        fits = len(shape) == 2 and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        if set(self.shapes) != {"input_ids"} or set(self.addresses) != {"input_ids", "output0"}:
            return False
        self.engine.ran.append((self.profile, self.shapes["input_ids"], self.addresses["input_ids"]))
        return True


class FakeEngine:
    """Of one open input, ``input_ids`` [1, length]: profile 0 from 2 to 64, and one for each of ``exact``."""

    num_io_tensors = 2

    def __init__(self, *exact: int) -> None:
        self.lengths = [(2, 64, 64), *((n, n, n) for n in exact)]
        self.num_optimization_profiles = len(self.lengths)
        self.contexts: list[FakeContext] = []
        self.ran: list[tuple[int, tuple[int, ...], int]] = []

    def create_execution_context(self) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]

    def get_tensor_name(self, i: int) -> str:
        return ("input_ids", "output0")[i]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "input_ids" else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1, -1) if name == "input_ids" else (1, 1, 8)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert name == "input_ids"
        return [(1, n) for n in self.lengths[profile]]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> torch.cuda.Stream:
    made = cast(torch.cuda.Stream, SimpleNamespace(cuda_stream=7, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made)
    return made


def session(engine: FakeEngine) -> Session:
    trt = SimpleNamespace(Runtime=lambda logger: None, TensorIOMode=SimpleNamespace(OUTPUT="out"))
    torch_tensorrt = SimpleNamespace(logging=SimpleNamespace(TRT_LOGGER=None))
    return Session(Stack(trt, torch_tensorrt, "tensorrt"), None, engine=engine)


def bound(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(1, length, dtype=torch.int64), "output0": torch.zeros(1, 1, 8)}


def test_a_length_with_a_profile_of_its_own_runs_by_it_and_every_other_by_the_first(stream: torch.cuda.Stream) -> None:
    engine = FakeEngine(16, 64)
    under_test, expected = session(engine), []
    for length, profile in ((7, 0), (64, 2), (64, 2), (16, 1), (17, 0), (15, 0), (64, 2), (2, 0)):
        tensors = bound(length)
        under_test.bind(tensors)
        under_test.run(stream)
        expected.append((profile, (1, length), tensors["input_ids"].data_ptr()))

    assert engine.ran == expected
    assert sorted(context.profile for context in engine.contexts) == [0, 1, 2]


def test_a_length_that_grows_over_an_exact_one_keeps_its_buffers(stream: torch.cuda.Stream) -> None:
    engine = FakeEngine(16)
    under_test, tensors = session(engine), bound(64)
    under_test.bind(tensors | {"input_ids": tensors["input_ids"][:, :14]})
    for length in range(14, 19):
        assert under_test.fit({"input_ids": (1, length)})
        under_test.run(stream)

    address = tensors["input_ids"].data_ptr()
    assert engine.ran == [(int(n == 16), (1, n), address) for n in range(14, 19)]


@pytest.mark.parametrize("length", [1, 65])
def test_a_length_outside_the_range_is_refused_after_an_exact_one(length: int, stream: torch.cuda.Stream) -> None:
    under_test = session(FakeEngine(64))
    under_test.bind(bound(64))
    with pytest.raises(UserError, match=rf"input_ids \(1, {length}\): outside the engine's profile"):
        under_test.bind(bound(length))
    under_test.bind(bound(64))
    under_test.run(stream)


def test_an_engine_with_one_profile_has_one_context(stream: torch.cuda.Stream) -> None:
    engine = FakeEngine()
    under_test = session(engine)
    for length in (2, 64, 7):
        under_test.bind(bound(length))
        under_test.run(stream)
    assert len(engine.contexts) == 1


# What is verified


def lengths(exact: tuple[int, ...], capacity: int = 0, least: int = 2, most: int = 2048) -> list[int]:
    shape = ShapeConfig("dynamic", 1, least, most, most)
    return [case.length for case in cases(VerifyConfig(), shape, ["input_ids"], "last", capacity, exact)]


def test_a_graph_in_pytorch_has_no_kernels_that_change_at_512() -> None:
    shape = ShapeConfig("dynamic", 1, 2, 2048, 2048)
    every = cases(VerifyConfig(), shape, ["input_ids"], "last", kernels=False)
    assert [case.length for case in every] == [2, 7, 77, 2048]


def test_every_exact_length_is_verified_and_both_ends_of_those_beside_it() -> None:
    assert lengths(()) == [2, 7, 77, 511, 512, 513, 2048]
    assert lengths((2048,)) == [2, 7, 77, 511, 512, 513, 2047, 2048]
    assert lengths((300, 2047, 2048)) == [2, 7, 77, 300, 511, 512, 513, 2046, 2047, 2048]
    assert lengths((2,), most=64) == [2, 3, 7, 64]
    assert lengths((5, 6), least=5, most=6) == [5, 6]


def test_behind_a_prompt_of_exact_length_a_token_reads_the_cache() -> None:
    assert lengths((), 128, most=64) == [2, 7, 64, 65, 128]
    assert lengths((32, 64), 128, most=64) == [2, 7, 32, 33, 63, 64, 65, 128]
    assert lengths((64,), 64, most=64) == [2, 7, 63, 64]  # no room for a token


def test_the_prompt_of_a_case_has_an_exact_length_where_one_is_near() -> None:
    config = compose_config(["cache=in_engine", "shape.max=48", "shape.exact=[32,48]", "benchmark=none"])
    model, shape = tiny.model("llama"), config.shape
    cache = cache_shape(model, config.cache, shape, 60)
    traced = [
        cached_forms.trace_prefill(cached_forms.PrefillForm(model, cache), cache, shape, tiny.CPU),
        cached_forms.trace_decode(cached_forms.DecodeForm(model, cache), cache, tiny.CPU),
    ]
    programs = [GraphSession(each.program.module(), tuple(spec.name for spec in each.inputs)) for each in traced]
    prompts: list[int] = []

    class Prompts(GraphSession):
        def bind(self, tensors: dict[str, Tensor]) -> None:
            self.length = tensors["input_ids"].shape[1]
            programs[0].bind(tensors)

        def run(self, stream: Any) -> None:
            prompts.append(self.length)
            programs[0].run(stream)

    generator = CachedGenerator(Prompts(programs[0]._graph, ()), programs[1:], cache, 128, tiny.CPU)
    forward = candidate._cached("engine", generator, shape, False, tuple(shape.exact)).forward
    for length in (31, 32, 33, 47, 48, 49, cache.longest):
        tokens = tiny.tokens(1, length)
        with torch.no_grad():
            wanted = model(tokens).logits[:, -1:]
        torch.testing.assert_close(forward({"input_ids": tokens}), wanted, atol=1e-4, rtol=1e-4)

    assert cache.longest == 128 and prompts == [27, 32, 32, 43, 48, 48, 48]
