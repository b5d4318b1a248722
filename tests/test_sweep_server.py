"""``tracking=server``: a real ``mlflow server`` over PostgreSQL and an artifact folder, either of which dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny_llama
from postgres import Postgres, postgres
from sweeps import Server, Sweep, runs, wait_for

from pipeline.tracking.runs import fetch_engine

JOBS = ("strategy=detect_causal", "strategy=mask_input", "strategy=upstream")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server | Postgres]]:
    """The tracking server, and the database that it keeps its runs in."""
    pytest.importorskip("flask", reason="mlflow-skinny cannot serve")
    with postgres() as database:
        server = Server(tmp_path_factory.mktemp("server"), database.uri)
        try:
            server.start()
            yield {"server": server, "database": database}
        finally:
            server.kill()


@pytest.mark.parametrize("victim", [pytest.param(each, marks=pytest.mark.slow) for each in ("server", "database")])
def test_a_sweep_whose_store_dies_in_the_middle_sends_the_rest_on_the_next_start(
    victim: str, servers: dict[str, Any], tmp_path: Path
) -> None:
    model, address = save_tiny_llama(tmp_path / "model", num_hidden_layers=1), servers["server"].uri
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    sweep = Sweep(
        cwd,
        (
            "model=local", f"model.path={model}", "shape.max=64", "strategy=detect_causal,mask_input,upstream",
            "tracking=server", f"tracking.uri={address}", f"tracking.experiment={victim}", "store.enabled=false",
        ),
    )  # fmt: skip

    process = sweep.start()
    wait_for(lambda: list(cwd.glob("outputs/sweeps/*/rows/*.json")) or process.poll() is not None)
    servers[victim].kill()
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "reports are not in MLflow yet; the same command sends them" in shown, shown
    before = {path: path.stat().st_mtime_ns for path in cwd.glob("outputs/*/*/engine.trt")}
    assert len(before) == 3

    code, shown = sweep.finish()
    assert code == 2 and shown.startswith(f"error: tracking.uri={address}") and shown.count("\n") == 1, shown

    servers[victim].start()
    code, shown = sweep.finish()
    assert code == 0 and "3 of 3 jobs done" in shown and "not in MLflow" not in shown, shown
    assert shown.splitlines()[-1].endswith("comparison.html")
    assert all(entry["skipped"] for entry in sweep.entries().values())
    assert before == {path: path.stat().st_mtime_ns for path in cwd.glob("outputs/*/*/engine.trt")}
    everything_is_there(sweep, address, victim)


def everything_is_there(sweep: Sweep, address: str, experiment: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(address)
    found = client.get_experiment_by_name(experiment)
    assert found is not None and found.artifact_location.startswith("mlflow-artifacts:")
    parents, children = ([r for r in kind if r.info.experiment_id == found.experiment_id] for kind in runs(address))
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert {file.path for file in client.list_artifacts(parents[0].info.run_id)} >= {"summary.md", "comparison.html"}
    assert [run.info.status for run in children] == ["FINISHED"] * 3
    assert {f"strategy={run.data.params['strategy.name']}" for run in children} == set(JOBS)
    folders = {entry["run_id"]: sweep.cwd / entry["folder"] for entry in sweep.entries().values()}
    for run in children:
        assert run.data.metrics["verify.passed"] == 1
        folder = folders[run.info.run_id]
        kept = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert kept == {path.name for path in folder.iterdir()}
        assert (
            fetch_engine(run.info.run_id, address, graph_suffices=True).read_bytes()
            == (folder / "engine.trt").read_bytes()
        )
