"""The measurements that the docs are made of are one command each: which jobs it has, and that each asks for what its
row is about."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from conftest import CONF
from omegaconf import OmegaConf

from pipeline.__main__ import _main, compose_config
from pipeline.config.lengths import capacity_of, longest_sequence
from pipeline.config.schema import BenchmarkShape, Config, GenerateShape


def swept(experiment: str) -> list[list[str]]:
    """The settings of each job."""
    grid = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").hydra.sweeper.params
    return [list(job) for job in product(*([f"{key}={v}" for v in values.split(",")] for key, values in grid.items()))]


def composed(experiment: str) -> list[Config]:
    return [compose_config([f"experiment={experiment}", *job]) for job in swept(experiment)]


@pytest.mark.parametrize(
    ("experiment", "count"),
    [("prompt_lengths", 15), ("batches", 6), ("precision", 4), ("long_prompts", 4), ("windows", 8)],
)
def test_the_plan_of_an_experiment_has_every_job_and_creates_nothing(
    experiment: str, count: int, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(["-m", f"experiment={experiment}", "dry_run=true"]) == 0
    shown = capsys.readouterr().out

    assert len(swept(experiment)) == count and f"{count} jobs, 0 of them finished, {count} to do" in shown
    for job in swept(experiment):
        assert " ".join(job) in shown
    assert list(cwd.iterdir()) == []


def test_a_prompts_length_is_that_of_its_engine_and_of_what_is_timed() -> None:
    jobs = composed("prompt_lengths")

    ways = {(job.backend.name, job.strategy.name if job.backend.name == "tensorrt" else "") for job in jobs}
    assert ways == {("tensorrt", "detect_causal"), ("tensorrt", "upstream"), ("torch_compile", "")}
    for job in jobs:
        length = job.shape.max
        assert (job.shape.kind, job.shape.min, job.shape.opt, job.shape.exact) == ("static", length, length, [])
        assert job.benchmark.shapes == [BenchmarkShape(batch=1, input_length=length)]
        assert (job.model.weights, job.model.logits, job.precision) == ("random", "last", "fp16")
    assert {job.shape.max for job in jobs} == {128, 512, 2048, 8192, 16384}


def test_a_long_prompt_runs_in_one_pass_and_in_chunks_over_a_cache_that_holds_it() -> None:
    jobs = composed("long_prompts")

    assert [job.cache.chunk for job in jobs] == [None, 2048, 4096, 8192]
    for job in jobs:
        assert (job.cache.name, job.model.name, job.precision) == ("in_engine", "llama3_1b", "fp16")
        assert job.benchmark.shapes == [BenchmarkShape(batch=1, input_length=32768)]
        assert capacity_of(job.cache, longest_sequence(job.shape, None)) > 32768


def test_a_window_is_timed_in_blocks_and_with_its_mask_and_so_are_pytorchs() -> None:
    jobs = composed("windows")

    ways = {
        (job.backend.attention or job.backend.mode, job.strategy.name)[job.backend.name == "tensorrt"] for job in jobs
    }
    assert ways == {"detect_causal", "mask_input", "reduce-overhead", "flex_attention"}
    for job in jobs:
        assert (job.shape.kind, job.shape.max, job.precision, job.model.weights) == ("static", 8192, "fp16", "random")
        assert job.benchmark.shapes == [BenchmarkShape(batch=1, input_length=8192)]
        assert job.model.architecture["sliding_window"] < 8192
    assert {job.model.name for job in jobs} == {"gemma3_270m", "mistral_7b"}


def test_a_batch_is_that_of_its_engine_of_its_prompt_and_of_its_generation() -> None:
    jobs = composed("batches")

    ways = {(job.backend.name, job.cache.name) for job in jobs}
    assert ways == {("tensorrt", "in_engine"), ("torch_compile", "static")}
    for job in jobs:
        batch = job.shape.batch
        assert job.benchmark.generate == GenerateShape(batch=batch, input_length=2048, output_length=128)
        assert job.benchmark.shapes == [BenchmarkShape(batch=batch, input_length=2048)]
        assert (job.model.name, job.model.weights, job.precision) == ("llama3_1b", "random", "fp16")
    assert {job.shape.batch for job in jobs} == {1, 4, 16}


def test_a_precision_is_timed_on_a_prompt_and_on_a_generation_of_real_weights() -> None:
    jobs = composed("precision")

    assert [job.precision for job in jobs] == ["fp16", "int8_weights", "int4_weights", "fp8"]
    for job in jobs:
        assert job.model.weights == "pretrained" and job.cache.name == "in_engine"
        assert job.benchmark.generate is not None and len(job.benchmark.shapes) == 1
        assert not job.holds_small("engine") and job.holds_small("decode") == (job.precision != "fp16")
    assert jobs[0].sweep.baseline == "precision:fp16"
