"""What a run verifies and times: its engines, the graphs they were made from where no GPU can run them, or a rival."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from passes.errors import UserError
from passes.tensorrt.versions import load_stack
from pipeline.config.schema import BackendConfig, CacheConfig, ModelConfig, ShapeConfig
from pipeline.engine.file import check_target, read_engine, read_manifest
from pipeline.engine.runner import open_engine
from pipeline.engine.session import GraphSession, Held, Session
from pipeline.generate.prompts import PromptRunner
from pipeline.generate.with_cache import CachedGenerator
from pipeline.generate.without_cache import OneLengthGenerator, PrefixGenerator, at_one_length
from pipeline.model.load import LoadedModel
from pipeline.rivals.generation import rival_generator
from pipeline.rivals.prompt import TorchRunner
from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.call_form import CallForm
from pipeline.verify.arithmetic import Forward, in_arithmetic, on_cpu
from pipeline.verify.cases import DECODED

if TYPE_CHECKING:
    from pipeline.engine.programs import Program
    from pipeline.generate.protocol import Generator
    from pipeline.measure.prompt import Runner


@dataclass(frozen=True)
class Machine:
    executed: str
    """The report's ``verify.executed``: ``engine``, ``graph``, or the rival's name."""
    forward: Forward
    shape: ShapeConfig
    """The lengths that ``forward`` takes."""
    runner: Runner | None = None
    """What the benchmark of prompts measures."""
    generator: Generator | None = None
    longest: int = 0
    """The longest sequence that ``forward`` takes, where that is more than the profile's longest prompt."""
    exact: tuple[int, ...] = ()
    """Lengths that an engine runs by an optimization profile of their own."""
    chunk: int | None = None
    """Tokens of a prompt that run at once, where that is not all of them."""
    finished: Callable[[], None] = lambda: None
    """To be called when it has been measured."""
    forced: Callable[[Tensor, Tensor | None, int], Tensor] | None = None
    """With a cache: :meth:`pipeline.generate.with_cache.CachedGenerator.forced_logits`."""
    held: Callable[[], Held] | None = None
    """What engines have on the device by now, beside their weights; None: they are none."""


@dataclass(frozen=True)
class Wanted:
    """What a machine has to do, whatever it is made of."""

    shape: ShapeConfig
    cache: CacheShape | None
    """None: there is none.  That of engines is in their manifest, from which it is read."""
    one_length: bool
    """Shorter sequences run in an engine of a single length too, see
    :attr:`pipeline.config.schema.Config.runs_at_one_length`."""
    generates: bool
    """A generation is to be timed."""


def engines(
    folder: Path, loaded: LoadedModel, wanted: Wanted, cuda_graph: bool | None, kernels: Path | None
) -> Machine:
    """The engine files of ``folder`` on this GPU.  ``cuda_graph``: ``backend.cuda_graph``.  ``kernels``: where the
    kernels that they compile are kept."""
    if wanted.cache is None:
        engine = open_engine(folder / "engine.trt", bool(cuda_graph), kernels)
        sessions, prefix = [engine.session], None
        if wanted.generates:
            sessions.append(engine.session.twin(specialise=wanted.one_length))
            prefix = _without_cache(sessions[-1], loaded, wanted, cuda_graph is not False)
        forward, taken = _of_any_length(engine.unguarded, wanted)
        exact = tuple(wanted.shape.exact)
        return Machine(
            "engine", forward, taken, engine, prefix, exact=exact, finished=engine.keep_kernels,
            held=lambda: Held(0, sum(each.activation_bytes for each in sessions)),
        )  # fmt: skip
    generator = open_generator(folder, cuda_graph is not False, kernels)
    exact = () if generator.cache.chunk else tuple(wanted.shape.exact)
    cached = _cached("engine", generator, wanted.shape, wanted.generates, exact, generator.keep_kernels)
    return replace(cached, held=lambda: generator.held)


def _of_any_length(forward: Forward, wanted: Wanted) -> tuple[Forward, ShapeConfig]:
    """``forward`` for every length that the run verifies, and which those are."""
    if not wanted.one_length:
        return forward, wanted.shape
    return at_one_length(forward, wanted.shape.max), replace(wanted.shape, min=1)


def _without_cache(session: Session, loaded: LoadedModel, wanted: Wanted, cuda_graph: bool) -> Generator:
    """What generates by running the whole prefix again."""
    vocabulary, device = vocabulary_of(loaded), loaded.model.device
    dtype = session.dtype(session.outputs[0])
    if wanted.one_length:
        return OneLengthGenerator(session, wanted.shape.max, vocabulary, dtype, device, cuda_graph)
    return PrefixGenerator(session, vocabulary, dtype, device)


def open_generator(folder: Path, cuda_graph: bool = True, kernels: Path | None = None) -> CachedGenerator:
    """The generator of a run with a KV cache, from the engines in its ``folder``; raises :class:`UserError` where
    there is none, or no GPU.  ``kernels``: where the kernels that they compile are kept."""
    prompts, steps = folder / "engine.trt", folder / "decode.trt"
    manifest = read_manifest(prompts)
    if not manifest.get("cache"):
        raise UserError(f"{folder}: its engine has no KV cache; make one with cache=in_engine")
    check_target(prompts, manifest)
    cache = CacheShape.of(manifest["cache"])
    stack, decode_kernels = load_stack(), None if kernels is None else kernels.with_name(f"decode-{kernels.name}")
    with ThreadPoolExecutor(2) as pool:  # hashing takes as long as loading
        engines = pool.map(read_engine, (prompts, steps))
        prefill = Session(stack, next(engines)[1], kernels)
        decode = Session(stack, next(engines)[1], decode_kernels)
    turns = [decode, *(decode.twin() for _ in range(1, cache.steps))]
    return CachedGenerator(prefill, turns, cache, decode.shape("output0")[-1], torch.device("cuda"), cuda_graph)


def graphs(programs: dict[str, Program], loaded: LoadedModel, wanted: Wanted, precision: str) -> Machine:
    """The programs that the engines were made from, in PyTorch on the CPU, in the arithmetic of ``precision``."""
    cache = wanted.cache
    if cache is None:
        module = programs["engine"].program.module()
        forward = in_arithmetic(lambda inputs: module(**inputs), on_cpu(precision))
        return Machine("graph", *_of_any_length(forward, wanted))
    generator = graph_generator(programs, cache, vocabulary_of(loaded), precision)
    return _cached("graph", generator, wanted.shape, wanted.generates)


def graph_generator(
    programs: dict[str, Program], cache: CacheShape, vocabulary: int, precision: str
) -> CachedGenerator:
    """The generator of a run with a KV cache, from the programs that its engines were made from, on the CPU."""
    modules, arithmetic = {name: each.program.module() for name, each in programs.items()}, on_cpu(precision)
    prefill, *turns = (
        GraphSession(modules[name], tuple(spec.name for spec in programs[name].inputs), arithmetic)
        for name in ("engine", *["decode"] * cache.steps)
    )
    return CachedGenerator(prefill, turns, cache, vocabulary, torch.device("cpu"))


def rival(
    backend: BackendConfig, loaded: LoadedModel, wanted: Wanted, form: ModelConfig, cache: CacheConfig
) -> Machine:
    """Eager PyTorch or ``torch.compile`` on this GPU."""
    runner = TorchRunner(CallForm(loaded.model, form.logits), form.inputs, backend)
    generator = rival_generator(loaded.model, backend, cache) if wanted.generates else None
    return Machine(backend.name, runner, wanted.shape, runner, generator)


def _cached(
    executed: str,
    generator: CachedGenerator,
    shape: ShapeConfig,
    generates: bool,
    exact: tuple[int, ...] = (),
    finished: Callable[[], None] = lambda: None,
) -> Machine:
    """A cached generator as a function of whole sequences: the last tokens go through the cache one by one, behind a
    prompt of ``exact`` length where one ends there."""
    least, most, turn = shape.min, shape.max, generator.cache.turn

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        tokens, real = inputs["input_ids"], inputs.get("attention_mask")
        longest = tokens.shape[1] if real is None or generator.cache.padded else int(real.sum(1).max())
        decoded = max(min(DECODED, longest - least), longest - most, 0)
        if shape.kind == "static":
            decoded = longest - most
        decoded = max((n for n in range(decoded + 1) if longest - n in exact), default=decoded)
        if turn is not None and longest - decoded <= turn < longest:
            decoded = longest - turn - 1  # a sequence that began before it may not cross it
        return generator.forced_logits(tokens, None if real is None else real == 0, decoded)[:, -1:]

    runner = PromptRunner(generator, alone=not generates) if executed == "engine" else None
    timed = generator if generates else None
    cache, forced = generator.cache, generator.forced_logits
    return Machine(executed, forward, shape, runner, timed, cache.longest, exact, cache.chunk, finished, forced)


def vocabulary_of(loaded: LoadedModel) -> int:
    """How many logits there are; the embedding of some models is padded beyond the tokenizer's vocabulary."""
    head: Any = loaded.model.get_output_embeddings()
    return int(head.weight.shape[0])
