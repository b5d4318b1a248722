"""The parts of a sweep, without one: keys, the plan, the table, how a process ends, the registry."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny_llama
from reports import real, timed

from passes.errors import UserError
from pipeline.__main__ import _main, compose_config
from pipeline.compare.__main__ import main as compare_reports
from pipeline.record.report import upgraded
from pipeline.sweep import isolation, registry, table
from pipeline.sweep.estimate import device_bytes
from pipeline.sweep.isolation import Ended
from pipeline.sweep.jobs import Row, plan
from pipeline.sweep.keys import Commits, content_key, settings_key, sweep_key

# Keys and the plan


def test_the_key_of_a_job_is_what_it_asks_for_and_not_where_its_results_go() -> None:
    same = ["output=elsewhere", "tracking.experiment=other", "sweep.timeout_minutes=1", "rerun=true"]
    others = ["precision=bf16", "strategy=lowering", "seed=1", "shape.max=1024", "backend.optimization_level=1"]

    assert {settings_key(compose_config([override])) for override in same} == {settings_key(compose_config([]))}
    assert len({settings_key(compose_config([override])) for override in ["seed=0", *others]}) == len(others) + 1


def test_the_content_key_changes_with_the_weights_of_a_local_folder_and_with_what_stands_around(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    config = compose_config(["model=local", f"model.path={tmp_path}"])
    before = content_key(config, "versions", Commits())
    assert content_key(config, "versions", Commits()) == before != content_key(config, "other versions", Commits())

    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert content_key(config, "versions", Commits()) != before
    assert settings_key(config) == settings_key(replace(config, output="elsewhere"))


def test_a_sweep_is_its_jobs_in_whatever_order() -> None:
    assert sweep_key(["a", "b"]) == sweep_key(["b", "a"]) != sweep_key(["a"])


def test_a_job_is_called_by_what_sets_it_apart() -> None:
    composed = [
        (["++shape.max=64", f"seed={seed}"], compose_config(["shape.max=64", f"seed={seed}"])) for seed in (1, 2)
    ]
    assert [job.label for job in plan(composed)] == ["seed=1", "seed=2"]


# Processes


def end(how: str) -> int:
    if how == "return":
        print("printed into the log")
        return 3
    if how == "children":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        return 0
    if how == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(300)
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    raise ValueError(how)


def test_a_call_in_a_process_of_its_own_ends_as_it_may_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(isolation, "GRACE_S", 0.5)
    log = tmp_path / "log"

    assert isolation.call(end, ("return",), log, 60).exit_code == 3
    assert log.read_text().count("printed into the log") == 1
    crashed = isolation.call(end, ("crash",), log, 60)
    assert crashed.signal_name == "SIGSEGV" and not crashed.timed_out
    assert "Fatal Python error: Segmentation fault" in log.read_text()  # faulthandler says where
    assert isolation.call(end, ("raise",), log, 60).exit_code == 1 and "ValueError: raise" in log.read_text()
    deaf = isolation.call(end, ("deaf",), log, 3)  # time enough to turn deaf
    assert deaf.timed_out and deaf.signal_name == "SIGKILL" and deaf.seconds < 10
    assert isolation.call(end, ("children",), log, 60).exit_code == 0
    sleepers = [p for p in psutil.Process().children(recursive=True) if "time.sleep(300)" in " ".join(p.cmdline())]
    assert sleepers == []


def take_turn(name: str, book: str, before_s: float, turn: isolation.Asking) -> int:
    """Prepare for ``before_s``, then write down when the turn began, with whom waiting, and when it ended."""
    time.sleep(before_s)
    if name == "never":
        return 0
    with turn() as waiting:
        begin = time.monotonic()
        time.sleep(0.2)
        if name == "late":
            time.sleep(300)
        Path(book, name).write_text(json.dumps([begin, time.monotonic(), sorted(waiting), os.getpid()]))
    return 0


def test_calls_at_the_same_time_take_turns_once_all_are_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "GRACE_S", 0.5)
    names = {"quick": 0.0, "second": 0.0, "slow": 2.0, "never": 1.0, "late": 0.0}
    turns, began = isolation.Turns(len(names)), time.monotonic()
    (tmp_path / "book").mkdir()

    def call(name: str) -> Ended:
        arguments = (name, str(tmp_path / "book"), names[name])
        return isolation.call(take_turn, arguments, tmp_path / name, 30 if name != "late" else 1.0, turns)

    with ThreadPoolExecutor(len(names)) as pool:
        ended = dict(zip(names, pool.map(call, names), strict=True))

    assert [name for name, each in ended.items() if each.timed_out] == ["late"]
    assert ended["late"].seconds < 6 and ended["quick"].seconds < 6  # waiting counts neither as time taken nor as late
    entries = sorted(json.loads(file.read_text()) for file in (tmp_path / "book").iterdir())
    assert len(entries) == 3
    assert entries[0][0] - began > 2.0  # not before the slowest was ready
    assert all(one[1] <= other[0] for one, other in pairwise(entries))
    for place, (*_, waiting, own) in enumerate(entries):
        behind = {entry[3] for entry in entries[place + 1 :]}
        assert behind <= set(waiting) and own not in waiting


def test_a_call_that_is_killed_while_it_waits_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "GRACE_S", 0.5)
    turns = isolation.Turns(3)  # the third never comes
    (tmp_path / "book").mkdir()
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(isolation.call, take_turn, (name, str(tmp_path / "book"), 0.0), tmp_path / name, 30, turns)
            for name in ("one", "other")
        ]
        while len(turns._waiting) < 2:
            time.sleep(0.05)
        os.kill(min(turns._waiting), signal.SIGKILL)
        time.sleep(0.3)
        turns.leave(asked=False)
        ended = [call.result() for call in calls]

    assert sorted(each.exit_code for each in ended) == [-signal.SIGKILL, 0]
    assert len(list((tmp_path / "book").iterdir())) == 1


def test_a_process_that_the_kernel_killed_for_memory_is_told_from_one_that_somebody_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "memory.events"
    monkeypatch.setattr(isolation, "OOM_COUNTERS", (str(tmp_path / "none"), str(counter)))
    counter.write_text("low 0\noom 1\noom_kill 2\n")

    assert not isolation.call(kill, (str(counter), 2), tmp_path / "l", 60).out_of_memory
    assert isolation.call(kill, (str(counter), 3), tmp_path / "l", 60).out_of_memory


def kill(counter: str, count: int) -> int:
    """SIGKILL, after which the kernel's counter stands at ``count``."""
    Path(counter).write_text(f"oom_kill {count}\n")
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


# The table


def measured() -> dict[str, dict[str, Any]]:
    return {name: upgraded(real(f"llama3_1b-{name}")) for name in ("detect_causal", "upstream", "eager")}


def folders(tmp_path: Path, reports: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """Raw samples around the medians of ``reports``."""
    for name, report in reports.items():
        median = report["benchmark"]["prefill"]["device_ms"]["median"]
        samples = [median * (1 + (i - 20) / 2000) for i in range(41)]
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "samples.json").write_text(json.dumps({"prefill": {"device_ms": samples}}))
    return {name: tmp_path / name for name in reports}


@pytest.mark.parametrize("baseline", ["strategy:upstream", "backend:eager"])
def test_speed_ups_are_ratios_to_the_baseline_of_the_same_model_with_an_interval(baseline: str, tmp_path: Path) -> None:
    reports = measured()
    base = baseline.partition(":")[2]
    if base == "upstream":
        del reports["eager"]  # its strategy is one that was not used
    ratios = table.speed_ups(reports, folders(tmp_path, reports), baseline)

    def median(name: str) -> float:
        return reports[name]["benchmark"]["prefill"]["device_ms"]["median"]

    assert ratios[base][0] == 1 and set(ratios) == set(reports)
    ratio, low, high = ratios["detect_causal"]
    assert ratio == pytest.approx(median(base) / median("detect_causal")) and low < ratio < high < 1.02 * low


def test_a_job_without_a_baseline_that_agrees_with_it_has_no_speed_up(tmp_path: Path) -> None:
    reports = measured()
    del reports["eager"]
    other = reports["other precision"] = copy.deepcopy(reports["detect_causal"])
    other["config"]["precision"] = "bf16"
    where = folders(tmp_path, reports)
    untimed = reports["not timed"] = copy.deepcopy(reports["detect_causal"])
    untimed["benchmark"] = None

    assert set(table.speed_ups(reports, where, "strategy:upstream")) == {"detect_causal", "upstream"}


def test_a_speed_up_is_the_one_that_the_comparison_of_the_same_reports_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Value and interval to the last digit that is shown, whichever of the two is asked."""
    reports = measured()
    where = folders(tmp_path / "runs", reports)
    for name, report in reports.items():
        (where[name] / "report.json").write_text(json.dumps(report))

    value, low, high = table.speed_ups(reports, where, "strategy:upstream")["detect_causal"]
    page = tmp_path / "page"
    assert compare_reports([str(tmp_path / "runs"), "--baseline", "strategy:upstream", "-o", str(page)]) == 0

    shown = (page / "comparison.md").read_text()
    assert f"**detect_causal**: 9.11 ms; {value:.2f}× ({low:.2f}–{high:.2f}) as fast as upstream" in shown
    entry = {"job": "x", "status": "ok", "speed_up": (value, low, high)}
    assert f"{value:.2f}× ({low:.2f}–{high:.2f})" in table.markdown([entry], "strategy:upstream")


def test_a_baseline_is_the_row_that_does_the_same_work_as_in_the_comparison(tmp_path: Path) -> None:
    """Its cache and batch are the row's; of several, the one of the same profile; another one's time says nothing."""
    reports = measured()
    others = {"cached": ("cache", {"name": "static", "capacity": 64}), "batch": ("shape", {"batch": 2})}
    for name, (group, value) in others.items():
        reports[name] = copy.deepcopy(reports["detect_causal"])
        reports[name]["config"][group] |= value
    longer = reports["longer upstream"] = copy.deepcopy(reports["upstream"])
    longer["config"]["shape"]["max"] += 1
    ratios = table.speed_ups(reports, folders(tmp_path, reports), "strategy:upstream")
    assert set(ratios) == {"detect_causal", "upstream", "longer upstream", "eager"}
    assert ratios["upstream"] == (1, 1, 1)


def test_the_table_shows_every_job_failed_and_not_begun_ones_with_their_reasons(tmp_path: Path) -> None:
    reports = measured()
    reports["eager"]["status"] = "failed"
    reports["eager"]["failure"] = {
        "stage": "build",
        "kind": "crash",
        "message": "killed by SIGSEGV | here",
        "traceback": "",
    }
    rows = {name: Row(name, name, str(tmp_path), False, 1.0, "run") for name in reports}
    ratios = {"detect_causal": (2.27, 2.25, 2.29)}

    entries = table.entries({**dict.fromkeys(reports, "job"), "late": "late"}, rows, reports, ratios)
    shown = table.markdown(entries, "strategy:upstream").splitlines()

    assert [entry["status"] for entry in entries] == ["ok", "ok", "failed", "not_done"]
    assert "2.27× (2.25–2.29) strategy:upstream" in shown[2] and "9.11 ms" in shown[2]
    assert r"build: crash: killed by SIGSEGV \| here" in shown[4] and "not done" in shown[5]
    assert len({line.replace(r"\|", "").count("|") for line in shown}) == 1


def test_how_a_process_ended_becomes_the_kind_of_failure() -> None:
    from pipeline.sweep.attempt import _why

    config = compose_config(["sweep.timeout_minutes=0.5"])
    ends = {
        "timeout": Ended(-9, True, False, 30.0),
        "out_of_memory": Ended(-9, False, True, 1.0),
        "interrupted": Ended(130, False, False, 1.0, KeyboardInterrupt()),
        "crash": Ended(-11, False, False, 1.0),
    }
    assert {kind: _why(ended, config, "build").kind for kind, ended in ends.items()} == {kind: kind for kind in ends}
    assert "sweep.timeout_minutes=0.5" in _why(ends["timeout"], config, "build").message
    assert "SIGSEGV" in _why(ends["crash"], config, "build").message


# Dry run and registry


def test_a_dry_run_prints_jobs_time_and_memory_and_creates_nothing(
    tmp_path: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "model")
    settings = ["model=local", f"model.path={model}", "shape.max=64", "dry_run=true"]

    assert _main(["-m", "precision=fp16,fp32", *settings]) == 0
    shown = capsys.readouterr().out

    assert "precision=fp16" in shown and "precision=fp32" in shown and "2 to do" in shown and "unknown" in shown
    assert list(cwd.iterdir()) == []


def test_device_memory_comes_from_the_architecture() -> None:
    config = compose_config(["model=llama3_1b", "model.weights=random"])
    parameters = 1_235_814_400  # meta-llama/Llama-3.2-1B

    assert device_bytes(config, {}) == 8 * (parameters + 128_256)  # fp16 model, fp32 reference, fp16 engine
    assert device_bytes(replace(config, precision="fp32"), {}) == 16 * (parameters + 128_256)


@pytest.fixture
def registry_of(tmp_path: Path) -> Any:
    """An empty registry, and the rows of reports whose runs are in its store."""
    from mlflow import MlflowClient

    from pipeline.sweep.tracking import Parent

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("engines", artifact_location=(tmp_path / "kept").as_uri())

    def rows(reports: dict[str, Any]) -> dict[str, Row]:
        runs = {name: client.create_run(experiment, run_name=name).info.run_id for name in reports}
        return {name: Row(name, name, "", False, 1.0, run_id) for name, run_id in runs.items()}

    return client, Parent(uri, experiment, ""), rows


def test_the_registry_has_the_best_engines_of_each_model_that_were_executed_and_verified(registry_of: Any) -> None:
    client, parent, rows_of = registry_of
    reports = measured()
    reports["smaller"] = copy.deepcopy(reports["upstream"])
    reports["smaller"]["engine"]["bytes"] = 1
    for name, section, change in (
        ("wrong", "verify", {"passed": False}),
        ("graph alone", "verify", {"executed": "graph"}),
    ):
        reports[name] = copy.deepcopy(reports["smaller"])
        reports[name][section] |= change
        reports[name]["engine"]["bytes"] = 0.5
    rows = rows_of(reports)

    registry.register(parent, rows, reports)
    registry.register(parent, rows, reports)  # a sweep that is resumed

    chosen = {a: client.get_model_version_by_alias("llama3_1b", a) for a in ("fastest", "smallest")}
    assert {alias: version.run_id for alias, version in chosen.items()} == {
        "fastest": rows["detect_causal"].run_id, "smallest": rows["smaller"].run_id,
    }  # fmt: skip
    assert len(client.search_model_versions("name='llama3_1b'")) == 2
    model = client.get_registered_model("llama3_1b")
    assert set(model.aliases) == {"fastest", "smallest"}  # one precision: none is of better quality
    assert "executed on the GPU" in model.description and "`fastest`: the least time" in model.description
    median = reports["detect_causal"]["benchmark"]["prefill"]["device_ms"]["median"]
    tags = chosen["fastest"].tags
    assert float(tags["won.fastest"]) == float(tags["ms_prompt"]) == pytest.approx(median, rel=1e-5)
    assert tags["gpu"] == "NVIDIA H200" and tags["engine.verified"] == "engine"
    assert f"{tags['ms_prompt']} ms a prompt" in chosen["fastest"].description


def test_where_precisions_differ_the_least_error_has_an_alias_and_what_was_not_executed_none(registry_of: Any) -> None:
    client, parent, rows_of = registry_of
    reports = measured()
    finer = reports["finer"] = copy.deepcopy(reports["upstream"])
    finer["config"]["precision"] = "fp32"
    for case in finer["verify"]["cases"]:
        case["relative_error"] /= 1000
    rows = rows_of(reports)
    alone = copy.deepcopy(reports)
    for report in alone.values():
        report["verify"]["executed"] = "graph"
    registry.register(parent, rows, alone)
    assert list(client.search_registered_models()) == []

    registry.register(parent, rows, reports)

    best = client.get_model_version_by_alias("llama3_1b", "best_quality")
    assert best.run_id == rows["finer"].run_id
    assert float(best.tags["won.best_quality"]) == pytest.approx(float(best.tags["relative_error"]))


@pytest.mark.slow  # 20 s of MLflow writing
def test_a_registry_of_fifty_versions_is_read_in_a_second(registry_of: Any) -> None:
    client, parent, rows_of = registry_of
    reports = {}
    for name in map(str, range(50)):  # each faster than those before, as of fifty sweeps
        reports[name] = timed(measured()["detect_causal"], 1 / (1 + int(name)))
    rows = rows_of(reports)
    began = time.perf_counter()
    for name in reports:
        registry.register(parent, {name: rows[name]}, {name: reports[name]})
    registered = time.perf_counter()
    found = client.search_model_versions("name='llama3_1b'")
    fastest = client.get_model_version_by_alias("llama3_1b", "fastest")
    assert len(list(client.search_registered_models())) == 1
    read = time.perf_counter()

    print(f"50 sweeps registered in {registered - began:.2f} s, 50 versions read in {read - registered:.3f} s")
    assert len(found) == 50 and fastest.run_id == rows["49"].run_id
    assert read - registered < 1


# Hydra's launchers


def test_a_launcher_that_is_not_installed_is_refused_with_the_extra_that_has_it(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.__main__.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hydra/launcher=ray: not installed; pip install 'proved-attention\[ray\]'"):
        _main(["-m", "seed=1,2", "hydra/launcher=ray"])
    assert list(cwd.iterdir()) == []
