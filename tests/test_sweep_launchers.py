"""Sweeps by Hydra's other launchers and sweepers, as real commands: workers that share a ledger, trials of a search."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import save_tiny_llama
from sweeps import Sweep, make, runs

RAY = ("hydra/launcher=ray", "hydra.launcher.ray.remote.num_gpus=0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", num_hidden_layers=1)


@pytest.mark.slow
def test_workers_of_submitit_share_the_ledger_and_the_store_and_leave_typed_rows_too(
    tmp_path: Path, model: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
    sweep = make(tmp_path / "cwd", model, "seed=0,101,1", "hydra/launcher=submitit_local", "sweep.timeout_minutes=5")

    code, shown = sweep.finish()

    assert code == 1 and "seed=101: load: crash: killed by SIGKILL" in shown
    assert {label: entry["status"] for label, entry in sweep.entries().items()} == {
        "seed=0": "ok", "seed=101": "failed", "seed=1": "ok",
    }  # fmt: skip
    assert sweep.processes() == []


@pytest.mark.slow
def test_workers_of_submitit_do_a_finished_sweep_again_where_that_is_asked_for(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
    sweep = make(tmp_path / "cwd", model, "seed=0,101,1", "hydra/launcher=submitit_local", "sweep.timeout_minutes=5")
    assert sweep.finish()[0] == 1

    sweep.behave()
    again = Sweep(sweep.cwd, (*sweep.arguments, "rerun=true"))
    assert again.finish()[0] == 0
    assert not any(entry["skipped"] for entry in again.entries().values())
    parents, children = runs(f"sqlite:///{sweep.cwd}/mlflow.db")
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert [run.info.status for run in children] == ["FINISHED"] * 3  # those of before are runs of their own now
    assert sweep.processes() == []


@pytest.mark.slow
def test_workers_of_ray_leave_typed_rows_and_what_is_finished_is_not_done_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    sweep = make(tmp_path / "cwd", model, "seed=0,101,1,2", *RAY, "sweep.timeout_minutes=5")

    code, shown = sweep.finish()
    assert code == 1 and "seed=101: load: crash: killed by SIGKILL" in shown, shown
    table = {label: entry["status"] for label, entry in sweep.entries().items()}
    assert table == {"seed=0": "ok", "seed=101": "failed", "seed=1": "ok", "seed=2": "ok"}
    assert sweep.processes() == []

    sweep.behave()
    code, shown = sweep.finish()
    assert code == 0, shown
    assert {label for label, entry in sweep.entries().items() if not entry["skipped"]} == {"seed=101"}
    parents, children = runs(f"sqlite:///{sweep.cwd}/mlflow.db")
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert [run.info.status for run in children] == ["FINISHED"] * 4
    assert sweep.processes() == []


@pytest.mark.slow
def test_optuna_finds_the_best_setting_and_a_trial_that_fails_is_a_row_and_not_the_end(
    tmp_path: Path, model: Path
) -> None:
    """Small engines are sought, because nothing is timed without a GPU; the trials are the same at every start."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra optuna is not installed")
    search = ("experiment=optuna_builder", "hydra.sweeper.n_trials=5", "seed=choice(0,101)")
    sweep = make(tmp_path / "cwd", model, *search, "until=build", "sweep.objective=engine.bytes", "store.enabled=false")

    code, shown = sweep.finish()
    table = sweep.entries()
    well = {label: entry["engine_bytes"] for label, entry in table.items() if entry["status"] == "ok"}
    failed = table.keys() - well.keys()

    assert code == 1 and len(well) >= 2 and failed, shown
    assert {label for label in table if label.endswith("seed=101")} == failed
    (file,) = sweep.cwd.glob("outputs/sweeps/*/optimization_results.yaml")
    found = yaml.safe_load(file.read_text())
    best = " ".join(f"{key}={value}" for key, value in found["best_params"].items())
    assert well[best] == found["best_value"] == min(well.values())
    assert sweep.processes() == []


def test_ray_on_a_machine_without_a_gpu_is_refused_rather_than_left_to_wait_for_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from pipeline.host import gpu

    if gpu.card().name is not None:
        pytest.skip("is about machines without a GPU, where the launcher would wait for one")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sweep = make(tmp_path / "cwd", model, "seed=0,1", "hydra/launcher=ray")

    code, shown = sweep.finish()

    assert code == 2 and shown.count("\n") == 1 and "hydra.launcher.ray.remote.num_gpus=0" in shown
    assert list(sweep.cwd.iterdir()) == []
