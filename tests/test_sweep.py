"""Sweeps, as real commands: jobs that crash, hang and run out of memory, starts that are killed, and what is left."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import save_tiny_llama
from runs import GPU
from sweeps import Server, Sweep, make, runs, wait_for

WELL = [f"seed={seed}" for seed in range(6)]
KINDS = {"seed=101": "crash", "seed=102": "RuntimeError", "seed=103": "timeout", "seed=104": "out_of_memory"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", num_hidden_layers=1)


def swept(seeds: list[str]) -> str:
    return "seed=" + ",".join(seed.removeprefix("seed=") for seed in seeds)


class Ten:
    """A sweep of ten jobs, four of which misbehave; then the same command twice more."""

    def __init__(self, cwd: Path, model: Path) -> None:
        self.sweep = make(cwd, model, swept([*KINDS, *WELL]), "sweep.timeout_minutes=0.3")
        self.uri = f"sqlite:///{cwd}/mlflow.db"
        self.codes: list[int] = []
        self.tables: list[dict[str, dict[str, Any]]] = []
        self.orphans: list[list[psutil.Process]] = []
        self.runs: list[tuple[list[Any], list[Any]]] = []
        self.idle = 0.0
        self.cpu_s = 0.0
        self.shown = ""

    def go(self) -> None:
        for start in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            process = self.sweep.start()
            if start == 0:
                self.idle = self._share_of_a_core_while_a_job_hangs(psutil.Process(process.pid))
            self.shown, _ = process.communicate(timeout=600)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            self.codes.append(process.returncode)
            self.tables.append(self.sweep.entries())
            self.orphans.append(self.sweep.processes())
            self.runs.append(runs(self.uri))
            self.sweep.behave()

    def _share_of_a_core_while_a_job_hangs(self, process: psutil.Process) -> float:
        wait_for(lambda: len(list(self.sweep.cwd.glob("outputs/sweeps/*/rows/*"))) == 2)  # the third one hangs
        time.sleep(2)
        before = process.cpu_times()
        time.sleep(4)
        after = process.cpu_times()
        return (after.user + after.system - before.user - before.system) / 4


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Ten:
    sweep = Ten(tmp_path_factory.mktemp("ten"), model)
    sweep.go()
    return sweep


def test_a_job_that_crashes_raises_hangs_or_runs_out_of_memory_is_a_typed_row_and_the_sweep_goes_on(
    ten: Ten,
) -> None:
    table = ten.tables[0]

    assert ten.codes[0] == 1 and list(table) == [*KINDS, *WELL]
    assert {label: entry["failure"]["kind"] for label, entry in table.items() if entry["failure"]} == KINDS
    assert [entry["status"] for entry in table.values()].count("ok") == len(WELL)
    assert "SIGKILL" in table["seed=101"]["failure"]["message"]
    assert "sweep.timeout_minutes=0.3" in table["seed=103"]["failure"]["message"]
    for entry in table.values():
        folder = ten.sweep.cwd / entry["folder"]
        report = json.loads((folder / "report.json").read_text())
        assert report["status"] == ("failed" if entry["failure"] else "ok") and (folder / "run.log").exists()


def test_the_same_command_does_only_what_failed_and_then_nothing(ten: Ten) -> None:
    for start, done in ((1, set(KINDS)), (2, set())):
        assert ten.codes[start] == 0
        assert {label for label, entry in ten.tables[start].items() if not entry["skipped"]} == done
        assert all(entry["status"] == "ok" for entry in ten.tables[start].values())
    assert "10 of 10 jobs done" in ten.shown


HYDRA_AND_MLFLOW = """
import sys
from hydra import compose, initialize_config_dir
from mlflow import MlflowClient
from pipeline.__main__ import config_dir
for job in range(10):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        compose("config", overrides=[*sys.argv[2:], f"seed={job}"], return_hydra_config=True)
MlflowClient(sys.argv[1]).search_runs(["0"])
"""


def test_skipping_costs_twice_what_the_libraries_take_and_the_parent_of_a_running_job_next_to_nothing(
    ten: Ten,
) -> None:
    # Most of what finished jobs take is Hydra's compositions and MLflow's import; and all of it is longer where other
    # tests run beside this one.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = [each for each in ten.sweep.arguments if not each.startswith("seed=")]
    program = [sys.executable, "-c", HYDRA_AND_MLFLOW, ten.uri, *settings]
    subprocess.run(program, cwd=ten.sweep.cwd, env=ten.sweep.environment(), check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ten.cpu_s <= 2 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert ten.idle < 0.05


NOTHING_TO_DO = """
import sys, psutil
from mlflow import MlflowClient
from pipeline.__main__ import _main
searches, search = [], MlflowClient.search_runs
MlflowClient.search_runs = lambda *given, **named: searches.append(given) or search(*given, **named)
code = _main(sys.argv[1:])
heavy = {"torch", "transformers", "torch_tensorrt", "tensorrt", "z3", "matplotlib"} & set(sys.modules)
print(code, sorted(heavy), len(searches), psutil.Process().children())
"""


def test_a_sweep_with_nothing_to_do_imports_no_torch_starts_no_process_and_asks_mlflow_once(ten: Ten) -> None:
    program = [sys.executable, "-c", NOTHING_TO_DO, "-m", *ten.sweep.arguments]
    done = subprocess.run(program, cwd=ten.sweep.cwd, env=ten.sweep.environment(), capture_output=True, text=True)

    # For the parents of this folder and for the children of this one, however many jobs there are.
    assert done.stdout.split("\n")[-2] == "0 [] 4 []", done.stderr


def test_a_process_of_its_own_costs_a_job_less_than_six_seconds(ten: Ten) -> None:
    well = [entry for label, entry in ten.tables[0].items() if label in WELL]
    assert max(entry["process_seconds"] - entry["seconds"] for entry in well) < 6


def at_once(cwd: Path, model: Path) -> Sweep:
    """Four jobs, the last two of which fail, in waves of three."""
    jobs = ("model.inputs=[input_ids],[input_ids,attention_mask]", "precision=fp16,bf16")
    settings = ("strategy.unproven=error", "sweep.builders=3", f"store.folder={cwd}/engines")
    return make(cwd, model, "until=null", "benchmark=prefill", "benchmark.min_seconds=0.1", *jobs, *settings)


@pytest.mark.slow  # a minute; whose turn it is: test_sweep_parts
def test_jobs_that_go_in_waves_have_each_its_own_row_and_are_skipped_the_next_time(model: Path, tmp_path: Path) -> None:
    sweep = at_once(tmp_path / "sweep", model)
    code, shown = sweep.finish()

    assert code == 1, shown
    entries = list(sweep.entries().values())
    assert [entry["status"] for entry in entries] == ["ok" if GPU else "not_executed"] * 2 + ["failed"] * 2
    assert entries[2]["failure"]["stage"] == "strategy"
    reports = [json.loads((sweep.cwd / entry["folder"] / "report.json").read_text()) for entry in entries[:2]]
    if GPU:  # each had the GPU to itself, the other one beside it
        states = [report["benchmark"]["prefill"]["gpu"]["before"] for report in reports]
        assert [state["foreign_processes"] for state in states] == [0, 0]
        assert {state["waiting_processes"] for state in states} == {0, 1}

    code, shown = sweep.finish()
    assert code == 1 and shown.count("finished before") == 2, shown


@pytest.mark.slow  # as that of a single job
def test_ctrl_c_ends_a_whole_wave_and_keeps_its_rows(model: Path, tmp_path: Path) -> None:
    sweep = at_once(tmp_path / "sweep", model)
    process = sweep.start()
    wait_for(lambda: len(sweep.children()) == 3)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=120)

    assert process.returncode == 130 and "the same command goes on" in shown, shown
    wait_for(lambda: not sweep.processes())
    entries = list(sweep.entries().values())
    assert [entry["status"] for entry in entries] == ["failed"] * 3 + ["not_done"]
    assert {entry["failure"]["kind"] for entry in entries[:3]} == {"interrupted"}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU that PyTorch can use")
def test_every_job_has_a_cuda_of_its_own(model: Path, tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep", model, "until=verify", "strategy=detect_causal,mask_input")
    code, shown = sweep.finish()

    assert code == 0, shown
    for entry in sweep.entries().values():
        report = json.loads((sweep.cwd / entry["folder"] / "report.json").read_text())
        assert report["verify"]["executed"] == "engine" and report["verify"]["passed"]


def test_no_process_is_left(ten: Ten) -> None:
    assert ten.orphans == [[], [], []]


def test_mlflow_shows_one_parent_and_each_job_once_and_nothing_is_left_running(ten: Ten) -> None:
    for start, (parents, children) in enumerate(ten.runs):
        assert len(parents) == 1 and len(children) == 10
        expected = "FAILED" if start == 0 else "FINISHED"
        assert parents[0].info.status == expected
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
        statuses = [run.info.status for run in children]
        assert statuses.count("FAILED") == (4 if start == 0 else 0) and statuses.count("FINISHED") >= len(WELL)
    from mlflow import MlflowClient

    files = MlflowClient(ten.uri).list_artifacts(ten.runs[-1][0][0].info.run_id)
    assert {file.path for file in files} == {"summary.json", "summary.md", "comparison.html", "comparison.md"}


# Ctrl-C, and a second sweep


def test_ctrl_c_ends_the_running_job_with_its_report_and_says_how_to_go_on_and_a_second_sweep_is_refused_meanwhile(
    tmp_path: Path, model: Path
) -> None:
    sweep = make(tmp_path / "cwd", model, "seed=0,103,1")
    process = sweep.start()
    wait_for(lambda: len(list(sweep.cwd.glob("outputs/jobs/*.json"))) == 2 or process.poll() is not None)
    time.sleep(0.5)
    code, said = make(tmp_path / "cwd", model, "seed=7,8").finish()
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)

    assert code == 2 and said.count("\n") == 1 and "output=outputs: another sweep is running there" in said
    assert process.returncode == 130 and "the same command goes on" in shown
    assert {label: entry["status"] for label, entry in sweep.entries().items()} == {
        "seed=0": "ok", "seed=103": "failed", "seed=1": "not_done",
    }  # fmt: skip
    reports = [json.loads(path.read_text()) for path in sweep.cwd.glob("outputs/*/*/report.json")]
    assert sorted(r["failure"]["kind"] if r["failure"] else "" for r in reports) == ["", "interrupted"]
    assert sweep.processes() == []
    parents, children = runs(f"sqlite:///{sweep.cwd}/mlflow.db")
    assert [run.info.status for run in parents] == ["KILLED"]
    assert sorted(run.info.status for run in children) == ["FINISHED", "KILLED"]


# Killed at any moment

JOBS = [f"seed={seed}" for seed in range(5)]


def kill(victim: str, sweep: Sweep, process: Any, server: Server) -> None:
    if victim == "parent":
        process.kill()
    elif victim == "server":
        server.kill()
    else:
        for child in sweep.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def killed_again_and_again(folder: Path, model: Path, victims: list[str], chance: random.Random) -> None:
    """A sweep that loses ``victims``, one a start, at random moments, comes to the table of one that loses none."""
    server = Server(folder / "server")
    sweep = make(folder / "cwd", model, swept(JOBS), "tracking=server", f"tracking.uri={server.uri}")
    finished: set[str] = set()
    try:
        for victim in victims:
            server.start()
            process = sweep.start()
            begun = chance.random() < 0.75  # else while it starts
            if begun:
                rows = chance.randrange(len(JOBS))
                wait_for(
                    lambda least=rows, p=process: (
                        p.poll() is not None or len(list(sweep.cwd.glob("outputs/sweeps/*/rows/*.json"))) >= least
                    )
                )
            time.sleep(chance.uniform(0, 1.5 if begun else 6))
            kill(victim, sweep, process, server)
            if victim == "parent":
                process.communicate(timeout=60)
                wait_for(lambda: not sweep.processes())  # the job ends itself
            else:
                process.communicate(timeout=300)
            reports = sweep.cwd.glob("outputs/*/*/report.json")
            done = {str(path.parent) for path in reports if '"status": "ok"' in path.read_text()}
            assert finished <= done
            finished = done
        server.start()
        code, shown = sweep.finish()

        assert code == 0, shown
        assert sweep.table() == dict.fromkeys(JOBS, ("ok", None))
        assert finished <= {str(sweep.cwd / entry["folder"]) for entry in sweep.entries().values()}
        parents, children = runs(server.uri)
        assert [run.info.status for run in parents] == ["FINISHED"]
        assert [run.info.status for run in children] == ["FINISHED"] * len(JOBS)
        assert len({run.data.tags["sweep.job"] for run in children}) == len(JOBS)
        assert sweep.processes() == []
    finally:
        server.kill()


@pytest.mark.slow
def test_a_sweep_that_loses_its_parent_and_then_the_server_resumes_to_the_same_table(
    tmp_path: Path, model: Path
) -> None:
    pytest.importorskip("flask", reason="mlflow-skinny cannot serve")
    killed_again_and_again(tmp_path, model, ["parent", "server"], random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_fifty_random_kill_points_resume_to_the_same_table(seed: int, tmp_path: Path, model: Path) -> None:
    chance = random.Random(seed)
    victims = [chance.choice(["parent", "parent", "child", "server"]) for _ in range(5)]
    killed_again_and_again(tmp_path, model, victims, chance)
