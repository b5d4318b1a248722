"""Whole generations on a simulated device: what is counted where, what voids and what taints, and the floor."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from simulated import MS, QUIET, Measured, SimulatedClock
from torch import Tensor

from passes.errors import RunError
from pipeline.config.schema import BenchmarkConfig, GenerateShape
from pipeline.measure.ceilings import Ceilings
from pipeline.measure.generation import STEPPED_GENERATIONS, measure_generation
from pipeline.measure.roofline import DecoderCost, decode_floor_s, prefill_floor_s, step_floors_s
from pipeline.record.plots import latency_plot

PROMPT, NEW = 16, 5
COST = DecoderCost(4, 8, (None, 10), 1000, 500, False, 2, key_value_heads=2)


@dataclass
class SimulatedGenerator:
    """A prefill takes 20 ms of the device, step ``k`` after it ``step_ns(k)``; each takes ``launch_ns`` of the host."""

    clock: SimulatedClock = field(default_factory=SimulatedClock)
    step_ns: Callable[[int], int] = lambda k: 2 * MS
    prefill_ns: Callable[[int], int] = lambda generation: 20 * MS
    launch_ns: int = MS // 10
    lost: int = 0
    cuda_graph: bool = True
    generation: int = 0
    stream: None = None
    prefills: int = 0
    steps: int = 0
    collecting: list[bool] = field(default_factory=list)
    on_decode: Callable[[SimulatedGenerator], None] = lambda self: None

    def prepare(self, tokens: Tensor, new_tokens: int, padding: Tensor | None = None) -> None:
        self.batch = len(tokens)
        self.generation += 1

    def _launch(self, device_ns: int) -> None:
        self.clock.launch(self.launch_ns, device_ns)
        self.collecting.append(gc.isenabled())

    def prefill(self) -> None:
        self._launch(self.prefill_ns(self.prefills))
        self.prefills += 1
        self.steps = 0

    def decode(self) -> None:
        self.steps += 1
        self._launch(self.step_ns(self.steps))
        self.on_decode(self)

    def tokens(self) -> Tensor:
        return torch.zeros(self.batch, self.steps + 1 - self.lost, dtype=torch.int64)


def config(**changes: object) -> BenchmarkConfig:
    settings = {"min_generations": 6, "min_seconds": 0.1, "warmup_seconds": 1.0} | changes
    return BenchmarkConfig("generate", generate=GenerateShape(1, PROMPT, NEW), **settings)  # type: ignore[arg-type]


def measured(generator: SimulatedGenerator, settings: BenchmarkConfig | None = None, **more: object) -> Measured:
    settings = settings or config()
    assert settings.generate is not None
    tokens = torch.zeros(settings.generate.batch, PROMPT, dtype=torch.int64)
    arguments = {"cached": True, "clock": generator.clock, "read_state": lambda: QUIET} | more
    return Measured(measure_generation(generator, settings, tokens, **arguments))  # type: ignore[arg-type]


def test_the_first_token_and_the_others_are_timed_apart_from_the_whole() -> None:
    entry = measured(SimulatedGenerator()).report["generate"]

    assert entry["device_ms"]["median"] == pytest.approx(28.0)  # 20 and 4 steps of 2
    assert entry["ttft_ms"]["median"] == 20.0
    assert entry["tpot_ms"]["median"] == 2.0
    assert entry["host_ms"]["median"] == pytest.approx(28.0)
    assert (entry["input_length"], entry["output_length"], entry["device_ms"]["n"]) == (PROMPT, NEW, 6)
    assert entry["tokens_per_s"] == pytest.approx(NEW / 28e-3)
    assert entry["cuda_graph"] is True and entry["tainted"] == []


def test_time_per_output_token_leaves_out_the_first_and_averages_the_rest() -> None:
    result = measured(SimulatedGenerator(step_ns=lambda k: k * MS))

    assert result.report["generate"]["tpot_ms"]["median"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert result.samples["generate"]["step_ms"] == [1.0, 2.0, 3.0, 4.0]
    assert result.report["decode"]["device_ms"]["n"] == 6 * 4
    assert result.report["decode"]["cache_length"] == {"first": PROMPT + 1, "last": PROMPT + NEW - 1}


def test_enqueue_time_is_the_launches_alone_although_the_host_runs_ahead_elsewhere() -> None:
    report = measured(SimulatedGenerator(launch_ns=MS // 2)).report

    assert report["generate"]["enqueue_ms"]["median"] == pytest.approx(NEW * 0.5)
    assert report["generate"]["enqueue_ms"]["n"] == STEPPED_GENERATIONS
    assert report["decode"]["enqueue_ms"]["median"] == 0.5
    assert not report["generate"]["launch_bound"] and not report["decode"]["launch_bound"]


def test_a_host_that_launches_more_slowly_than_the_device_runs_is_called_launch_bound() -> None:
    report = measured(SimulatedGenerator(launch_ns=3 * MS)).report

    assert report["decode"]["launch_bound"] is True
    assert report["generate"]["launch_bound"] is False  # 15 of 28 ms: the prefill hides them


@pytest.mark.parametrize(("generations", "seconds", "expected"), [(6, 0.0, 6), (4, 0.28, 10)])
def test_both_the_least_generations_and_the_least_seconds_are_reached(
    generations: int, seconds: float, expected: int
) -> None:
    result = measured(SimulatedGenerator(), config(min_generations=generations, min_seconds=seconds))

    assert expected <= result.report["generate"]["device_ms"]["n"] <= expected + 2


def test_warm_up_ends_once_generations_settle_and_is_left_out() -> None:
    rising = SimulatedGenerator(prefill_ns=lambda generation: max(20, 60 - 4 * generation) * MS)
    result = measured(rising, config(warmup_seconds=60.0))

    assert set(result.samples["generate"]["ttft_ms"]) == {20.0}
    assert result.report["generate"]["warmup"]["settled"] is True
    assert 10 <= result.report["generate"]["warmup"]["iterations"] <= 16


def test_slow_generations_get_a_warm_up_that_can_settle_whatever_its_bound() -> None:
    entry = measured(SimulatedGenerator(prefill_ns=lambda _: 4000 * MS), config(warmup_seconds=1.0)).report["generate"]

    assert entry["warmup"]["settled"] is True and entry["warmup"]["iterations"] == 4


def test_warm_up_that_does_not_settle_stops_and_taints() -> None:
    growing = SimulatedGenerator(prefill_ns=lambda generation: 100 * 2**generation * MS)
    entry = measured(growing).report["generate"]

    assert entry["warmup"] == {"iterations": 4, "seconds": pytest.approx(1.532), "settled": False}
    assert "warm-up did not settle within 1.0 s" in entry["tainted"]


def test_a_generation_with_fewer_tokens_than_asked_for_is_void() -> None:
    with pytest.raises(RunError, match=r"\(1, 5\) tokens .* left \(1, 4\)") as caught:
        measured(SimulatedGenerator(lost=1))
    assert caught.value.kind == "tokens"


def test_a_capture_while_timing_voids_the_measurement() -> None:
    def capture(generator: SimulatedGenerator) -> None:
        if generator.prefills == 10 and generator.steps == 2:
            generator.generation += 1

    with pytest.raises(RunError, match="generation of the runner 1 -> 2") as caught:
        measured(SimulatedGenerator(on_decode=capture))
    assert caught.value.kind == "unsteady"


def test_what_the_gpu_says_taints_and_garbage_collection_is_off() -> None:
    generator = SimulatedGenerator()
    entry = measured(generator, read_state=lambda: replace(QUIET, foreign_processes=1)).report["generate"]

    assert entry["tainted"] == ["1 other process on the GPU"]
    assert not any(generator.collecting) and gc.isenabled()


def test_running_out_of_device_memory_says_what_was_needed() -> None:
    def exhaust(generator: SimulatedGenerator) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ... ")

    with pytest.raises(RunError, match="GiB needed at once") as caught:
        measured(SimulatedGenerator(on_decode=exhaust))
    assert caught.value.kind == "out_of_memory"


# --- Roofline


def test_the_floor_of_a_step_reads_weights_once_and_every_rows_cache_within_its_window() -> None:
    weights, per_token = (1000 + 500) * 2, 2 * 2 * 8 * 2  # bytes: keys and values, 2 heads of 8, fp16
    seen = 15 + 10  # one layer sees all, the other a window of 10
    got = decode_floor_s(COST, batch=3, cache_length=15, copy_gb_per_s=1e-6, matmul_tflops=1e9)

    assert got == pytest.approx((weights + 3 * per_token * seen) / 1e3)
    computing = decode_floor_s(COST, batch=3, cache_length=15, copy_gb_per_s=1e9, matmul_tflops=1e-9)
    assert computing == pytest.approx(3 * (2 * 1500 + 4 * 8 * 4 * seen) / 1e3)


@pytest.mark.parametrize("cached", [True, False])
def test_the_floor_of_a_generation_is_that_of_its_prefill_and_each_step(cached: bool) -> None:
    got = step_floors_s(COST, 1, PROMPT, NEW, cached, 1e-6, 1e-9)

    step = decode_floor_s if cached else prefill_floor_s
    assert got[0] == prefill_floor_s(COST, 1, PROMPT, 1e-6, 1e-9)
    assert got[1:] == [step(COST, 1, length, 1e-6, 1e-9) for length in (17, 18, 19, 20)]
    report = measured(
        SimulatedGenerator(), cached=cached, cost=COST, ceilings=Ceilings(1e-3, {"fp16": 1e-6})
    ).report  # fmt: skip
    floor_ms = 1e3 * sum(step_floors_s(COST, 1, PROMPT, NEW, cached, 1e-3, 1e-6))
    assert report["generate"]["floor_ms"] == pytest.approx(floor_ms)
    assert report["generate"]["roofline_fraction"] == pytest.approx(floor_ms / 28.0)
    assert report["decode"]["roofline_fraction"] == pytest.approx(report["decode"]["floor_ms"] / 2.0)


def test_the_plot_draws_times_by_step_beside_the_distributions(tmp_path: Path) -> None:
    latency_plot(measured(SimulatedGenerator()).samples, tmp_path / "latency.png")

    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
