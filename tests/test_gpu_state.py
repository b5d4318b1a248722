"""The state of a GPU while something is timed on it, and what of it speaks against a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from simulated import QUIET

from pipeline.host import gpu
from pipeline.host.gpu import GpuState


def test_power_and_heat_taint_by_their_share_of_the_measurement() -> None:
    before = replace(QUIET, at_s=10.0, power_limited_s=100.0, thermally_limited_s=7.0)
    slightly = replace(QUIET, at_s=12.0, power_limited_s=100.01, thermally_limited_s=7.0)
    assert gpu.taints(before, slightly) == []
    much = replace(slightly, power_limited_s=100.5)
    assert gpu.taints(before, much) == ["clocks held back by the power limit for 25% of the measurement"]


def test_another_process_taints_and_so_does_a_state_that_cannot_be_read() -> None:
    assert gpu.taints(QUIET, replace(QUIET, foreign_processes=2)) == ["2 other processes on the GPU"]
    blind = GpuState(at_s=0.0, missing={"nvml": "Driver Not Loaded"})
    assert gpu.taints(blind, blind) == ["state of the GPU not known: nvml: Driver Not Loaded"]


def test_this_process_is_not_foreign_even_under_the_hosts_number() -> None:
    assert gpu.foreign({11, 12, 13}, own=12) == 2
    assert gpu.foreign({4711}, own=12) == 0
    assert gpu.foreign(set(), own=12) == 0


def test_processes_that_wait_for_their_turn_are_counted_and_are_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml:
        NVMLError = OSError

        def __getattr__(self, name: str) -> Callable[..., object]:
            return lambda *_: []

        @staticmethod
        def nvmlDeviceGetComputeRunningProcesses(_: object) -> list[object]:
            return [SimpleNamespace(pid=pid, usedGpuMemory=pid * 1000) for pid in (os.getpid(), 11, 12, 13)]

    for name, value in {"_nvml": nullcontext((Nvml(), "")), "_handle": (object(), "")}.items():
        monkeypatch.setattr(gpu, name, lambda *_, value=value: value)
    monkeypatch.setattr(gpu, "_throttle_reasons", lambda *_: ())
    monkeypatch.setattr(gpu, "_violation_s", lambda *_: 0.0)
    monkeypatch.setattr(Nvml, "nvmlDeviceGetPowerUsage", lambda *_: 1e3, raising=False)
    for part in ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMemoryInfo"):
        monkeypatch.setattr(Nvml, part, lambda *_: SimpleNamespace(gpu=0, used=0), raising=False)

    state = gpu.read_state({12, 13, 14})
    assert (state.foreign_processes, state.waiting_processes) == (1, 2)
    assert gpu.taints(state, state) == ["1 other process on the GPU"]
    alone = gpu.read_state({11, 12, 13})
    assert (alone.foreign_processes, gpu.taints(alone, alone)) == (0, [])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 100))
    assert gpu.memory() == (os.getpid() * 1000, 100)  # of this process alone
    monkeypatch.setattr(Nvml, "nvmlDeviceGetComputeRunningProcesses", lambda *_: [], raising=False)
    assert gpu.memory() == (40, 100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_state_is_unknown_and_says_why() -> None:
    state = gpu.read_state()
    assert state.sm_clock_mhz is None and state.foreign_processes is None
    assert state.missing["nvml"]
    assert gpu.memory() is None
