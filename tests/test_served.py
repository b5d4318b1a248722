"""SmolLM2 from the README's command to an answer over HTTP: a verified engine, its model in MLflow, a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import environment
from runs import DONE, GPU, artifacts, mlflow_run, outcome_in
from serving import Server, asked, served, several_at_once

from passes.errors import UserError
from pipeline.deploy import described, of_engine
from pipeline.deploy.opened import open_model
from pipeline.deploy.request import read
from pipeline.host.files import sha256_of
from pipeline.tracking import runs

ON_CPU = None if GPU else "torch"


def default_job(cwd: Path, longest: int) -> tuple[str, str]:
    """The README's command in ``cwd``; what it found, and what it showed.  Its engine is built, whatever the store of
    this user has of earlier tests."""
    short = [f"shape.opt={longest}", f"shape.max={longest}", "shape.exact=[]"] if longest != 2048 else []
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "tracking.log_model=graph", f"store.folder={cwd / 'store'}", *short],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Of the 2048 tokens CI has 128: three passes of PyTorch over 2048 take it minutes, and so would TensorRT's kernels
    for an exact length, which test_profiles has.  The rest is a real model of 30 layers."""
    cwd = tmp_path_factory.mktemp("default")
    return cwd, *default_job(cwd, 128)


@pytest.mark.parametrize("longest", [128, pytest.param(2048, marks=pytest.mark.slow)])
def test_the_default_job_makes_a_verified_engine_of_smollm2(
    longest: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if longest == 128:
        cwd, found, shown = request.getfixturevalue("default_run")
    else:
        cwd, (found, shown) = tmp_path, default_job(tmp_path, longest)
    outcome = outcome_in(cwd / "outputs")
    report = outcome.report
    assert report["status"] == DONE and report["failure"] is None
    assert report["model"]["parameters"] == 134_515_008 and report["model"]["weights"] == "pretrained"
    assert report["attention"]["summary"]["by_mask"] == {"causal": 30}
    assert report["attention"]["summary"]["by_action"] == {"native_causal": 30}
    assert all(call["native_gqa"] for call in report["attention"]["calls"])
    engine = report["engine"]
    assert (engine["iattention"], engine["iattention_causal"], engine["softmax"]) == (30, 30, 0)
    assert engine["iattention_fused"] == 30 and engine["bytes"] > 200e6
    lengths = [case["length"] for case in report["verify"]["cases"]]
    kernels_change = [511, 512, 513] if GPU and longest > 513 else []
    assert report["verify"]["passed"] and lengths == [2, 7, 77, *kernels_change, longest]
    assert "Paris" in report["verify"]["answer"]["candidate"]
    assert report["stages_s"]["strategy"] <= 0.05 * sum(report["stages_s"].values())
    assert "30 causal → 30 native_causal" in found and "Paris" in found and "✓ verify" in shown
    assert Path(cwd, found.splitlines()[-1]) == outcome.folder / "report.json", "as a script takes it"

    store = f"sqlite:///{cwd}/mlflow.db"
    kept = mlflow_run(store, outcome)
    dynamic = f" · dynamic 2..{longest}" if longest != 2048 else ""
    assert kept.info.run_name == f"detect_causal · smollm2_135m{dynamic}"
    assert kept.info.status == "FINISHED" and kept.data.metrics["verify.passed"] == 1
    files = {"report.json", "engine.trt", "engine.json", "graph_before.txt", "graph_after.txt", "attention_calls.md"}
    assert files <= artifacts(store, kept.info.run_id)
    assert runs.fetch_engine(kept.info.run_id, store, graph_suffices=not GPU).stat().st_size == engine["bytes"]


QUESTIONS = ("What is the capital of France?", "Name a colour.", "What is 2 + 2?", "Say hello.", "Who wrote Hamlet?")


MALFORMED: list[tuple[Any, str]] = [
    ({"max_tokens": 4}, "Request payload"),
    ({"messages": []}, "messages=[]: must be a list of at least one message"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role='robot'"),
    (asked("x", max_tokens=10**6), "max_tokens=1000000: behind 31 tokens of messages there is room for 98 more"),
    (asked("x", max_tokens=-1), "max_tokens=-1"),
    (asked("x", max_tokens="4"), "max_tokens='4'"),
    (asked("x", temperature=float("nan")), "temperature=nan"),
    (asked("x " * 200), "tokens, and the engine takes from 2 to 128"),
    ({"messages": "x"}, "messages='x'"),
    ("{", "valid JSON"),
]


@pytest.fixture(scope="module")
def server(default_run: tuple[Path, str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The run by its id alone, in a folder of its own."""
    cwd = default_run[0]
    store = f"sqlite:///{cwd}/mlflow.db"
    run_id = outcome_in(cwd / "outputs").report["mlflow"]["run_id"]
    with served(f"runs:/{run_id}/model", store, tmp_path_factory.mktemp("elsewhere"), ON_CPU) as server:
        server.wait()
        yield server


def test_a_run_is_served_by_its_id_and_answers_over_http(server: Server) -> None:
    status, reply = server.ask(asked(QUESTIONS[0], max_tokens=16))

    assert status == 200, reply
    message = {"role": "assistant", "content": "The capital of France is Paris."}
    assert reply["choices"] == [{"index": 0, "message": message, "finish_reason": "stop"}]
    assert reply["usage"] == {"prompt_tokens": 37, "completion_tokens": 7, "total_tokens": 44}
    drawn = [server.ask(asked("Say hello.", max_tokens=2, temperature=1.5, seed=i))[1]["choices"] for i in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_several_requests_at_once_are_answered_as_each_would_be_alone(server: Server) -> None:
    right = [asked(QUESTIONS[i % len(QUESTIONS)], max_tokens=3) for i in range(8)]
    several_at_once(server, right, MALFORMED, at_once=6)


def test_a_model_names_its_engine_and_holds_no_weights(default_run: tuple[Path, str, str]) -> None:
    outcome = outcome_in(default_run[0] / "outputs")
    model = outcome.folder / "model"
    described = json.loads((model / "data" / "chat" / "model.json").read_text())
    engine = outcome.report["engine"]
    assert described["engines"] == [{key: engine[key] for key in ("file", "bytes", "sha256")}]
    assert described["settings"]["stop"] == [2] and described["verified"] == outcome.report["verify"]["executed"]
    held = {path: path.stat().st_size for path in model.rglob("*") if path.is_file()}
    assert sum(held.values()) < 20e6 and model / "data" / "chat" / "tokenizer" / "tokenizer.json" in held
    assert sha256_of(outcome.folder / "engine.trt") == engine["sha256"]


@pytest.mark.skipif(GPU, reason="the engine runs here")
def test_a_machine_without_the_gpu_is_told_before_anything_is_loaded(default_run: tuple[Path, str, str]) -> None:
    data = outcome_in(default_run[0] / "outputs").folder / "model" / "data" / "chat"
    with pytest.raises(UserError, match="its engine was never executed, and only its graph was verified"):
        open_model(data, None, "", print)
    executed = replace(described.read(data), verified="engine", built_for="NVIDIA H100 80GB HBM3")
    with pytest.raises(
        UserError, match=r"was built for NVIDIA H100 80GB HBM3 \(tensorrt_rtx .*no NVIDIA GPU; .*on_cpu"
    ):
        of_engine.check_machine(executed)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the graph is a CPU's own elsewhere")
def test_a_graph_that_was_traced_on_a_gpu_is_the_same_on_a_cpu(default_run: tuple[Path, str, str]) -> None:
    data = outcome_in(default_run[0] / "outputs").folder / "model" / "data" / "chat"
    answerer = open_model(data, "torch", "", print).answerer
    assert answerer.answer(read(asked(QUESTIONS[0]), answerer.settings)).text == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: replace(d, mlflow="2.9.0"),
            r"MLflow 2\.9\.0, and this is 3\..*install mlflow==2\.9\.0",
        ),
        (
            lambda d: replace(d, model=replace(d.model, sha256="0" * 64)),
            "has weights of sha256 .* were of 0000",
        ),
        (lambda d: replace(d, model=replace(d.model, sha256=None)), "weights are random, and another machine draws"),
        (lambda d: replace(d, schema=99), "is of form 99"),
    ],
    ids=["mlflow", "weights", "random", "schema"],
)
def test_a_model_that_is_not_what_it_was_is_refused(
    change: Any, said: str, default_run: tuple[Path, str, str], tmp_path: Path
) -> None:
    data = outcome_in(default_run[0] / "outputs").folder / "model" / "data" / "chat"
    described.write(tmp_path, change(described.read(data)))
    with pytest.raises(UserError, match=said) as refused:
        open_model(tmp_path, "torch", "", lambda _: None)
    assert "\n" not in str(refused.value)


def test_an_engine_that_is_another_than_the_models_is_refused(
    default_run: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder = outcome_in(default_run[0] / "outputs").folder
    found = described.read(folder / "model" / "data" / "chat")
    manifest = json.loads((folder / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps(manifest | {"sha256": "1" * 64}))
    with pytest.raises(UserError, match=r"engine\.trt: is of sha256 1111.*, and the model's is"):
        of_engine.check_files(found, tmp_path)
