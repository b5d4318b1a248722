"""What the timer of prompts writes down, on a simulated device."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace

import pytest
import torch
from simulated import MS, QUIET
from simulated_prompts import SimulatedRunner, config, measured, prompts, simulated

from passes.errors import RunError
from pipeline.config.schema import BenchmarkConfig
from pipeline.host import gpu


def test_the_clocks_are_in_milliseconds_and_apart() -> None:
    result = measured(simulated(device_ns=lambda i: 5 * MS, launch_ns=2 * MS))
    assert set(result.samples["prefill"]["device_ms"]) == {5.0}
    assert set(result.samples["prefill"]["host_ms"]) == {5.0}
    assert set(result.samples["prefill"]["enqueue_ms"]) == {2.0}
    entry = result.report["prefill"]
    assert entry["device_ms"] == {"median": 5.0, "mad": 0.0, "p05": None, "p95": None, "n": 20, "ci95": [5.0, 5.0]}
    assert (entry["batch"], entry["input_length"], entry["cuda_graph"]) == (1, 2048, False)
    assert entry["tokens_per_s"] == pytest.approx(2048 / 5e-3)
    assert entry["tainted"] == []


def test_a_full_launch_queue_does_not_count_as_enqueue_time() -> None:
    entry = measured(simulated(device_ns=lambda i: 5 * MS, launch_ns=MS // 10, queue=1)).report["prefill"]
    assert entry["enqueue_ms"]["median"] == 0.1
    assert entry["launch_bound"] is False


@pytest.mark.parametrize(("launch_ns", "bound"), [(3_900_000, False), (4_100_000, True), (9_000_000, True)])
def test_launch_bound_is_said_above_four_fifths_of_device_time(launch_ns: int, bound: bool) -> None:
    runner = simulated(device_ns=lambda i: 5 * MS, launch_ns=launch_ns)
    assert measured(runner).report["prefill"]["launch_bound"] is bound


@pytest.mark.parametrize(
    ("device_ns", "iterations", "seconds"),
    [(5 * MS, 30, 1.0), (200 * MS, 30, 1.0), (MS // 10, 30, 0.5)],
    ids=["seconds bind", "iterations bind", "many short passes"],
)
def test_a_loop_honours_both_its_least_iterations_and_its_least_seconds(
    device_ns: int, iterations: int, seconds: float
) -> None:
    runner = simulated(device_ns=lambda i: device_ns, launch_ns=MS // 100)
    samples = measured(runner, config(min_iterations=iterations, min_seconds=seconds)).samples["prefill"]
    for name in ("device_ms", "host_ms"):
        assert len(samples[name]) >= iterations
        assert sum(samples[name]) / 1e3 >= seconds * 0.999
        assert sum(samples[name]) / 1e3 <= max(1.5 * seconds, 1.01 * iterations * device_ns / 1e9)
    assert len(samples["enqueue_ms"]) == len(samples["host_ms"])


def test_a_loop_of_tiny_passes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.measure.prompt.MAX_ITERATIONS", 500)
    runner = simulated(device_ns=lambda i: 1000, launch_ns=100)
    result = measured(runner, config(min_iterations=50, min_seconds=10.0, warmup_seconds=0.01))
    assert result.report["prefill"]["device_ms"]["n"] == 500


def test_warm_up_ends_once_the_rolling_median_settles_and_is_left_out() -> None:
    runner = simulated(device_ns=lambda i: max(5, 100 - i) * MS)  # the clocks rise for 95 passes
    result = measured(runner, config(warmup_seconds=60.0))
    warmup = result.report["prefill"]["warmup"]
    assert 95 <= warmup["iterations"] <= 130
    assert warmup["settled"] is True
    assert set(result.samples["prefill"]["device_ms"]) == {5.0}


def test_warm_up_that_does_not_settle_stops_at_its_bound_and_taints() -> None:
    growth = itertools.count(1)
    entry = measured(simulated(device_ns=lambda i: next(growth) * MS), config(warmup_seconds=1.0)).report["prefill"]
    assert 1.0 <= entry["warmup"]["seconds"] < 1.2
    assert entry["warmup"]["settled"] is False
    assert "warm-up did not settle within 1.0 s" in entry["tainted"]


def test_drift_between_the_halves_taints() -> None:
    runner = simulated(device_ns=lambda i: (5 if i < 60 else 6) * MS)  # 40 passes of warm-up, then half of 40
    entry = measured(runner, config(min_iterations=40)).report["prefill"]
    assert entry["warmup"]["iterations"] == 40
    assert entry["drift"] is True
    assert entry["tainted"] == ["device_ms drifted between the halves of the measurement"]


def test_garbage_collection_is_off_while_timing_and_on_again_after() -> None:
    runner = simulated()
    assert gc.isenabled()
    measured(runner)
    assert not any(runner.collecting)
    assert gc.isenabled()


def test_garbage_collection_is_on_again_after_a_failure() -> None:
    def fail(runner: SimulatedRunner) -> None:
        if runner.passes == 50:
            raise ValueError("a pass failed")

    with pytest.raises(ValueError, match="a pass failed"):
        measured(simulated(on_pass=fail))
    assert gc.isenabled()


def test_garbage_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        measured(simulated())
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_binding_another_shape_while_timing_voids_the_measurement() -> None:
    def rebind(runner: SimulatedRunner) -> None:
        if runner.passes == 55:
            runner.prepare(prompts(1, 1024))

    with pytest.raises(RunError, match="generation of the runner 1 -> 2") as caught:
        measured(simulated(on_pass=rebind))
    assert caught.value.kind == "unsteady"


def test_a_recompilation_while_timing_voids_the_measurement() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled(torch.zeros(2))

    def another_length(runner: SimulatedRunner) -> None:
        compiled(torch.zeros(3 if runner.passes == 55 else 2))

    with pytest.raises(RunError, match="graphs compiled by torch"):
        measured(simulated(on_pass=another_length))
    torch._dynamo.reset()


def test_every_further_shape_is_an_entry_with_its_own_samples() -> None:
    runner = simulated()
    result = measured(runner, config(2048, 512, 128))
    assert [tuple(tokens.shape) for tokens in runner.prepared] == [(1, 2048), (1, 512), (1, 128)]
    assert result.report["prefill"]["input_length"] == 2048
    assert [entry["input_length"] for entry in result.report["prefill_shapes"]] == [512, 128]
    assert list(result.samples) == ["prefill", "prefill_1x512", "prefill_1x128"]
    assert all(list(clocks) == ["device_ms", "host_ms", "enqueue_ms"] for clocks in result.samples.values())


def test_prompts_are_timed_on_the_tokens_that_were_handed_over() -> None:
    runner = simulated()
    measured(runner, config(64))
    (tokens,) = runner.prepared
    assert torch.equal(tokens, prompts(1, 64)) and len(tokens.unique()) > 32


def test_one_shape_has_no_list_of_further_shapes_and_none_has_no_prefill() -> None:
    assert measured(simulated()).report["prefill_shapes"] == []
    none = measured(simulated(), BenchmarkConfig("none"))
    assert none.report["prefill"] is None and none.samples == {}


def test_what_the_gpu_reports_reaches_the_entry() -> None:
    throttled = replace(QUIET, throttle_reasons=("hardware thermal slowdown",), sm_clock_mhz=1200)
    entry = measured(simulated(), read_state=lambda: throttled).report["prefill"]
    assert entry["tainted"] == ["clocks held back by hardware thermal slowdown before and after the measurement"]
    assert entry["gpu"]["after"]["sm_clock_mhz"] == 1200


def test_running_out_of_device_memory_says_what_was_needed() -> None:
    def exhaust(runner: SimulatedRunner) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ... ")

    with pytest.raises(RunError, match=r"20.00 GiB needed at once") as caught:
        measured(simulated(on_pass=exhaust))
    assert caught.value.kind == "out_of_memory"
    assert str(gpu.out_of_memory(caught.value.__cause__, 3 * 2**30)).startswith(  # type: ignore[arg-type]
        "device memory: 20.00 GiB needed at once, 3.00 GiB free"
    )
