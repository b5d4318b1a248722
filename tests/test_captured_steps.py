"""The steps of a generation are captured once: a graph, with the addresses and numbers in it, serves every one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from test_decode import generator, hugging_face
from test_deploy import writer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import ShapeConfig
from pipeline.deploy import writers
from pipeline.deploy.writers import PrefixWriter
from pipeline.engine.session import GraphSession
from pipeline.generate import with_cache
from pipeline.generate.sampling import Sampling
from pipeline.generate.with_cache import CachedGenerator


class Captured(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: every operation with the tensors and the numbers that it was launched with."""

    def __init__(self, stream: Any, launch: Callable[[], object]) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        with self:
            launch()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, tensors(result)))
        return result

    def replay(self) -> None:
        for func, args, kwargs, before in self._operations:
            for old, new in zip(before, tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(result: Any) -> list[Tensor]:
    return [each for each in (result if isinstance(result, tuple | list) else [result]) if isinstance(each, Tensor)]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """A GPU of which nothing is there but the capturing."""
    made: list[Captured] = []

    def capture(stream: Any, launch: Callable[[], object]) -> Captured:
        made.append(Captured(stream, launch))
        return made[-1]

    monkeypatch.setattr(with_cache, "captured", capture)
    monkeypatch.setattr(with_cache, "behind_caller", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(GraphSession, "capturable", lambda session, stream: True)
    monkeypatch.setattr(
        CachedGenerator, "_fetched", lambda made, step: (made._tokens[:, step : step + 1].clone(), None)
    )
    return made


def on_gpu(made: CachedGenerator) -> CachedGenerator:
    made.stream, made._use_graph = object(), True  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("mode", ["in_engine", pytest.param("static", marks=pytest.mark.slow)])
def test_another_length_seed_and_number_of_tokens_capture_nothing_new(mode: str, captures: list[Captured]) -> None:
    plain, made = generator("llama", mode), on_gpu(generator("llama", mode))
    turns = len(made._decode)
    first, second = tiny.tokens(1, 11), tiny.tokens(1, 5, seed=3)

    assert made.generate(first, 12) == hugging_face("llama", first, 12)
    assert (len(captures), made.cuda_graph) == (turns, True)
    assert made.generate(second, 7) == hugging_face("llama", second, 7)
    assert made.generate(first, 20) == hugging_face("llama", first, 20)
    assert len(captures) == turns, "greedy answers share their graphs"

    asked = [(first, 9, Sampling(1.5, 0.9, 1)), (second, 15, Sampling(1.5, 0.9, 2)), (first, 9, Sampling(0.7, 0.5, 1))]
    drawn = [made.generate(prompt, new, sampling=sampling) for prompt, new, sampling in asked]
    assert drawn == [plain.generate(prompt, new, sampling=sampling) for prompt, new, sampling in asked]
    assert drawn[0] != drawn[2]
    assert len(captures) == 2 * turns, "and so do those that are drawn"
    assert made.generate(second, 7) == hugging_face("llama", second, 7) and len(captures) == 2 * turns


def test_a_program_of_one_length_is_captured_once_for_every_prompt(
    captures: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "captured", with_cache.captured)
    made = writer("none", ShapeConfig("static", 1, 24, 24, 24), ("input_ids", "last"))
    assert isinstance(made, PrefixWriter)
    made._use_graph = True
    asked = [(tiny.tokens(1, length, length)[0].tolist(), new) for length, new in ((9, 6), (4, 9), (9, 6))]
    for prompt, new in asked:
        assert [list(made.steps(prompt, new, Sampling()))] == hugging_face("llama", torch.tensor([prompt]), new)
    assert len(captures) == 1


def test_nothing_is_captured_for_a_single_token_or_between_judging_and_timing(captures: list[Captured]) -> None:
    made, prompt = on_gpu(generator("llama", "in_engine")), tiny.tokens(1, 9)
    assert made.generate(prompt, 1) == hugging_face("llama", prompt, 1) and captures == []
    made.prepare(prompt, 6)
    bound = made.generation
    made.forced_logits(prompt, None, 0)
    made.prepare(prompt, 6)
    assert made.generation == bound and len(captures) == 1
