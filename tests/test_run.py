"""Whole runs: real models, real engines, real MLflow stores; what each leaves behind, finished, failed or refused."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment
from conftest import TINY_LLAMA, save_tiny_llama
from rich.console import Console
from runs import APART, DONE, GPU, SMALL, artifacts, do, failure, mlflow_run, outcome_in

from passes.errors import UserError
from pipeline.__main__ import _main, compose_config
from pipeline.config.choices import STAGES
from pipeline.engine.runner import open_engine
from pipeline.host import interrupts
from pipeline.record.console import StageDisplay
from pipeline.run import Outcome
from pipeline.tracking import runs
from pipeline.tracking.engines import load_engine
from pipeline.tracking.names import parameters

# shared/DESIGN.md's report.json: what readers may count on.
CONTRACT = {
    "": "schema status failure config environment model attention engine verify benchmark stages_s",
    "environment": "gpu compute_capability supported_by_vendor driver torch torch_tensorrt tensorrt flavour "
    "transformers python git",
    "model": "name source revision sha256 parameters weights",
    "attention": "calls summary",
    "attention.summary": "by_mask by_action assumed",
    "attention.calls.0": "index name op mask proof depends_on action reason",
    "engine": "file bytes sha256 target layers iattention iattention_causal iattention_masked softmax "
    "torch_fallback_ops",
    "verify": "executed arithmetic cases passed",
    "verify.cases.0.worst_position": "row position measure found allowed",
    "verify.cases.0": "name relative_error max_abs cosine kl top1_agreement passed padding positions",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "one-layer", num_hidden_layers=1)


def at(report: dict[str, Any], path: str) -> Any:
    value: Any = report
    for part in filter(None, path.split(".")):
        value = value[int(part)] if part.isdigit() else value[part]
    return value


# What a finished run leaves


@pytest.fixture(scope="module")
def finished(store: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return do(store, tmp_path_factory.mktemp("runs"), tiny, "shape.max=64")


def test_report_json_keeps_the_contract(finished: Outcome) -> None:
    report = json.loads((finished.folder / "report.json").read_text())

    assert report["schema"] == 3 and report["status"] == DONE and report["failure"] is None
    for path, keys in CONTRACT.items():
        assert set(keys.split()) <= set(at(report, path)), path
    assert set(report["stages_s"]) == set(STAGES) - {"write"} - (set() if GPU else {"benchmark"})
    assert (report["benchmark"] is not None) == GPU
    assert report["export"] is None and list(finished.folder.glob("*.pt2")) == []  # nobody asked for it
    assert report["config"] == compose_config(
        ["model=local", f"model.path={report['config']['model']['path']}", "shape.max=64"]
    ).to_dict() | {key: report["config"][key] for key in ("output", "tracking", "store")}


def test_report_json_says_what_became_of_each_attention_call_and_what_the_network_holds(finished: Outcome) -> None:
    report = finished.report

    assert [call["mask"] for call in report["attention"]["calls"]] == ["causal", "causal"]
    assert report["attention"]["summary"]["by_action"] == {"native_causal": 2}
    engine = report["engine"]
    assert (engine["iattention"], engine["iattention_causal"], engine["iattention_masked"]) == (2, 2, 0)
    assert engine["softmax"] == 0 and engine["torch_fallback_ops"] == []
    assert [case["name"] for case in report["verify"]["cases"]] == [
        f"length_{n}" for n in ((2, 7, 63, 64) if GPU else (2, 7, 64))
    ]
    assert report["verify"]["passed"] and report["verify"]["executed"] == ("engine" if GPU else "graph")


def test_the_run_folder_holds_engine_graphs_and_tables(finished: Outcome) -> None:
    graph = (finished.folder / "graph_after.txt").read_text()
    table = (finished.folder / "attention_calls.md").read_text().splitlines()
    engine = (finished.folder / "engine.trt").read_bytes()

    assert "scaled_dot_product_attention" in (finished.folder / "graph_before.txt").read_text()
    assert "proved_attention" in graph and "scaled_dot_product_attention" not in graph
    assert len(table) == 4 and "native_causal" in table[2]
    assert len(engine) == finished.report["engine"]["bytes"]
    manifest = json.loads((finished.folder / "engine.json").read_text())
    assert manifest["sha256"] == finished.report["engine"]["sha256"]
    (spec,) = manifest["inputs"]
    assert (spec["name"], spec["min"], spec["max"], spec["exact"]) == ("input_ids", 2, 64, [64])
    assert finished.report["engine"]["profiles"] == [[2, 64, 64], [64, 64, 64]]


def test_mlflow_holds_settings_metrics_tags_and_files(finished: Outcome, store: str) -> None:
    kept = mlflow_run(store, finished)

    assert kept.info.status == "FINISHED" and kept.data.tags["status"] == DONE
    assert finished.report["mlflow"]["run_id"] == kept.info.run_id
    assert kept.info.run_name == "detect_causal · tiny-llama · dynamic 2..64"
    config = compose_config(
        [
            "model=local", f"model.path={finished.report['config']['model']['path']}", "shape.max=64",
            f"tracking.uri={store}", f"output={finished.report['config']['output']}", *APART,
        ]
    )  # fmt: skip
    assert kept.data.params == parameters(config)
    assert kept.data.metrics["engine.iattention_causal"] == 2
    assert kept.data.metrics["verify.passed"] == 1
    assert kept.data.metrics["verify.cases.length_64.relative_error"] < 1e-2
    assert set(kept.data.metrics) >= {f"stages_s.{stage}" for stage in finished.report["stages_s"]}
    assert any(key.startswith("benchmark.") for key in kept.data.metrics) == GPU
    assert kept.data.tags["torch"] == finished.report["environment"]["torch"]
    assert artifacts(store, kept.info.run_id) >= {path.name for path in finished.folder.iterdir()}


def test_the_engine_comes_back_from_mlflow_only_with_the_hash_that_was_recorded(
    finished: Outcome, store: str, tmp_path: Path
) -> None:
    run_id = mlflow_run(store, finished).info.run_id

    if not GPU:
        with pytest.raises(UserError, match=r"its engine was never executed, .* repeat the run on a GPU"):
            load_engine(run_id, store)

    fetched = runs.fetch_engine(run_id, store, tmp_path, graph_suffices=True)

    assert fetched.read_bytes() == (finished.folder / "engine.trt").read_bytes()
    if not GPU:
        with pytest.raises(UserError, match="needs an NVIDIA GPU"):
            load_engine(run_id, store, graph_suffices=True)
    fetched.write_bytes(fetched.read_bytes()[:-1])
    with pytest.raises(UserError, match="its sha256 is not the manifest's"):
        open_engine(fetched)
    fetched.unlink()
    with pytest.raises(UserError, match=r"engine\.trt: not there"):
        open_engine(fetched)


def test_the_summary_shows_attention_network_verification_and_where_everything_is(finished: Outcome) -> None:
    shown = io.StringIO()
    StageDisplay(Console(file=shown, width=200)).summary(finished.report, finished.folder, "run 1")

    text = shown.getvalue()
    assert "2 calls: 2 causal → 2 native_causal" in text
    assert "2 native attention (2 causal, 0 masked), 0 softmax" in text
    assert GPU or "fp16 on the CPU, products added up in fp32; the engine and the GPU's kernels did not run" in text
    assert "nearest to its limit: row 0, position " in text
    what = "engine" if GPU else "graph, no engine was executed"
    assert f"{what}: passed, 3 cases" in text and "run 1" in text
    assert text.splitlines()[-1] == str(finished.folder / "report.json"), "alone in the last line, as scripts take it"


def test_a_summary_that_is_piped_is_not_wrapped(finished: Outcome) -> None:
    narrow, wide = io.StringIO(), io.StringIO()
    for shown, width in ((narrow, 40), (wide, 400)):
        StageDisplay(Console(file=shown, width=width)).summary(finished.report, finished.folder, "run 1")
    assert narrow.getvalue() == wide.getvalue()


def test_notes_are_in_the_summary_where_their_own_stream_goes_elsewhere(
    finished: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = "30 masks stay, and could go if the attention mask is all ones, always: strategy.assume=[no_padding]"
    report = finished.report | {"notes": [hint]}
    StageDisplay().summary(report, finished.folder, None)  # standard output and standard error are two files here
    assert f"\nnote        {hint}\n" in capsys.readouterr().out

    both = io.StringIO()
    StageDisplay(Console(file=both, width=200)).summary(report, finished.folder, None)
    assert hint not in both.getvalue()  # it was shown when it was found


def test_the_summary_of_a_narrow_terminal_keeps_every_letter_of_a_path(finished: Outcome) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=40, force_terminal=True, color_system=None)
    StageDisplay(console).summary(finished.report, finished.folder, f"run 1  ({finished.folder})")

    text = re.sub(r"\s", "", shown.getvalue())
    assert str(finished.folder) in text.partition("MLflow")[2] and str(finished.folder / "report.json") in text


def test_messages_with_square_brackets_are_shown_as_they_are() -> None:
    shown = io.StringIO()
    display = StageDisplay(Console(file=shown, width=200))

    with display.stage("build"):
        display.update("[/bold] f16[1, s70]")
    display.failed("build", 1.0, "shape [/red] f16[1, s70]")
    display.note("mask [bold]")
    display.done("build", 1.0, "[/dim]")

    assert all(text in shown.getvalue() for text in ("shape [/red] f16[1, s70]", "mask [bold]", "[/dim]"))


# The axes

AXES = [
    ("strategy=mask_input", "precision=bf16", "shape=dynamic", (1, 0, 1, 0)),
    ("strategy=lowering", "precision=fp32", "shape=static", (1, 1, 0, 0)),
    ("strategy=decompose", "precision=fp16", "shape=static", (0, 0, 0, 1)),
    ("strategy=upstream", "precision=fp16", "shape=dynamic", None),
    pytest.param("strategy=detect_causal", "precision=bf16", "shape=static", (1, 1, 0, 0), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("strategy", "precision", "shape", "layers"), AXES)
def test_every_strategy_precision_and_shape_becomes_a_verified_engine(
    strategy: str,
    precision: str,
    shape: str,
    layers: tuple[int, ...] | None,
    store: str,
    one_layer: Path,
    tmp_path: Path,
) -> None:
    report = do(store, tmp_path, one_layer, strategy, precision, shape, *SMALL).report

    assert report["status"] == DONE, report["failure"]
    assert report["verify"]["passed"]
    engine = report["engine"]
    if layers is not None:
        found = (engine["iattention"], engine["iattention_causal"], engine["iattention_masked"], engine["softmax"])
        assert found == layers
    else:
        assert report["attention"]["summary"]["by_action"] == {"untouched": 1}
    assert (engine["iattention_fused"] == 0 and engine["notes"] != []) == (precision == "precision=fp32")


def test_padding_and_positions_as_inputs_keep_the_mask_and_are_verified_padded_and_packed(
    store: str, one_layer: Path, tmp_path: Path
) -> None:
    inputs = "model.inputs=[input_ids,attention_mask,position_ids]"
    report = do(store, tmp_path, one_layer, inputs, "shape.batch=2", "model.logits=all", *SMALL).report

    assert report["status"] == DONE, report["failure"]
    assert report["attention"]["summary"]["by_action"] == {"native_mask": 1}
    assert all("attention_mask" in call["depends_on"] for call in report["attention"]["calls"])
    assert {case["padding"] for case in report["verify"]["cases"]} == {"none", "left", "right"}
    assert {case["positions"] for case in report["verify"]["cases"]} == {"counted", "packed"}
    assert len(report["verify"]["cases"]) == 1 + 4 * (3 if GPU else 2)  # nothing to pad or pack at length 2
    assert report["engine"]["iattention_masked"] == 1 and report["engine"]["iattention_causal"] == 0


@pytest.mark.skipif(GPU, reason="what happens without a GPU")
@pytest.mark.parametrize("backend", ["eager", "torch_compile"])
def test_a_rival_without_a_gpu_is_not_executed_and_says_so(
    backend: str, store: str, tiny: Path, tmp_path: Path
) -> None:
    outcome = do(store, tmp_path, tiny, f"backend={backend}", *SMALL)

    assert outcome.report["status"] == "not_executed"
    assert "no GPU: nothing was run" in outcome.report["notes"]
    assert set(outcome.report["stages_s"]) == {"load"}
    assert outcome.report["engine"] is outcome.report["verify"] is outcome.report["benchmark"] is None
    assert mlflow_run(store, outcome).data.tags["status"] == "not_executed"


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=pytest.mark.slow if stage in ("export", "lower", "interpret") else ())
        for stage in STAGES
        if stage not in ("write", "benchmark")
    ],
)
def test_until_leaves_the_report_of_what_was_done_so_far(
    stage: str, store: str, one_layer: Path, tmp_path: Path
) -> None:
    outcome = do(store, tmp_path, one_layer, f"until={stage}", "shape.max=16", "benchmark=none")
    report, kept = outcome.report, mlflow_run(store, outcome)

    done = STAGES[: STAGES.index(stage) + 1]
    assert tuple(report["stages_s"]) == done
    assert report["status"] == (DONE if stage == "verify" else "ok")
    made = {"attention": "strategy", "engine": "interpret", "verify": "verify"}
    for section, maker in made.items():
        assert (report[section] is not None) == (maker in done), section
    assert (outcome.folder / "engine.trt").is_file() == ("build" in done)
    assert kept.info.status == "FINISHED"
    assert kept.data.tags.get("engine.verified") == {"build": "no", "verify": "engine" if GPU else "graph"}.get(stage)


# Failures: exit code 1, and the report says how


def test_a_model_that_cannot_be_exported_fails_in_its_stage(store: str, tmp_path: Path) -> None:
    folder = tmp_path / "dynamic-rope"
    folder.mkdir()
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}  # its angles depend on the data
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA | {"rope_parameters": rope}))

    outcome = do(store, tmp_path / "runs", folder, "model.weights=random", *SMALL)

    kept = mlflow_run(store, outcome)
    assert failure(outcome) == ("export", "export")
    assert "numbers in a tensor" in outcome.report["failure"]["message"]
    assert list(outcome.report["stages_s"]) == ["load", "export"]
    assert kept.info.status == "FAILED" and kept.data.tags["failure.stage"] == "export"
    assert "report.json" in artifacts(store, kept.info.run_id)


def test_an_engine_that_tensorrt_refuses_to_build_fails_with_its_message(
    store: str, one_layer: Path, tmp_path: Path
) -> None:
    outcome = do(store, tmp_path, one_layer, "backend.workspace_gib=1e-6", *SMALL)

    assert failure(outcome) == ("build", "build")
    assert "workspace" in outcome.report["failure"]["message"]
    assert outcome.report["engine"]["iattention_causal"] == 1 and outcome.report["engine"]["file"] is None
    assert mlflow_run(store, outcome).info.status == "FAILED"


def test_strategy_unproven_error_ends_the_run_before_anything_is_built(
    store: str, one_layer: Path, tmp_path: Path
) -> None:
    unproved = ["strategy.unproven=error", "model.inputs=[input_ids,attention_mask]"]
    outcome = do(store, tmp_path, one_layer, *unproved, *SMALL)

    assert failure(outcome) == ("strategy", "unproven")
    assert "attention_mask" in outcome.report["failure"]["message"]


class Unplugged(StageDisplay):
    """Breaks off a stage as a bug anywhere inside of it would."""

    def __init__(self, stage: str) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.breaks = stage

    def steps(self, message: str, done: int, total: int) -> bool:
        if self._stage == self.breaks:
            raise ZeroDivisionError(f"[{message}]\nsecond line")
        return True


def test_a_crash_inside_a_stage_is_in_the_report_with_its_traceback(
    store: str, one_layer: Path, tmp_path: Path
) -> None:
    outcome = do(store, tmp_path, one_layer, *SMALL, display=Unplugged("verify"))

    kept = mlflow_run(store, outcome)
    report = json.loads((outcome.folder / "report.json").read_text())
    assert failure(outcome) == ("verify", "ZeroDivisionError")
    assert report["failure"]["message"] == "[case]"
    assert "ZeroDivisionError" in report["failure"]["traceback"] and "test_run.py" in report["failure"]["traceback"]
    assert report["stages_s"]["verify"] > 0 and report["engine"]["sha256"]
    assert kept.info.status == "FAILED" and kept.data.tags["failure.kind"] == "ZeroDivisionError"
    assert "failure.traceback" not in kept.data.tags


def test_a_crash_while_loading_leaves_a_report_too(
    store: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Linear, "__init__", _exhausted)

    outcome = do(store, tmp_path, tiny, *SMALL)

    assert failure(outcome) == ("load", "out_of_memory")
    assert mlflow_run(store, outcome).info.status == "FAILED"
    assert torch.__version__.startswith(outcome.report["environment"]["torch"])


def _exhausted(*args: Any, **kwargs: Any) -> None:
    raise MemoryError("no memory left")


# Refusals by what only the load stage can see: exit code 2, nothing created


def bert(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))


def pickled(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    torch.save({}, folder / "pytorch_model.bin")


def empty(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (bert, "BertModel is not a causal LM"),
        (pickled, "pytorch_model.bin, which is a pickle and is never loaded"),
        (empty, "holds no weights"),
    ],
)
def test_a_model_folder_that_will_not_do_is_refused_and_nothing_is_created(
    make: Any, said: str, tmp_path: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)

    code = _main(["model=local", f"model.path={folder}", *SMALL])

    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1 and said in errors[0]
    assert list(cwd.iterdir()) == []


def test_a_length_above_the_models_own_is_refused_before_anything_is_loaded(tmp_path: Path, cwd: Path) -> None:
    folder = save_tiny_llama(tmp_path / "short", max_position_embeddings=32)

    with pytest.raises(UserError, match=r"shape\.max=64: above the model's max_position_embeddings=32"):
        _main(["model=local", f"model.path={folder}", *SMALL])

    assert list(cwd.iterdir()) == []


def test_a_store_that_is_no_store_is_refused_and_nothing_is_created(
    tiny: Path, cwd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.db").write_text("not a database, by far")

    code = _main(["model=local", f"model.path={tiny}", f"tracking.uri=sqlite:///{tmp_path}/no.db", *SMALL])

    assert code == 2
    assert f"tracking.uri=sqlite:///{tmp_path}/no.db" in capsys.readouterr().err
    assert list(cwd.iterdir()) == []


def test_an_experiment_that_was_deleted_is_refused_and_the_run_folder_is_gone(
    store: str, tiny: Path, cwd: Path, finished: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    client.delete_experiment(client.create_experiment("thrown away"))

    uri, name = f"tracking.uri={store}", "tracking.experiment='thrown away'"
    code = _main(["model=local", f"model.path={tiny}", uri, name, "until=load", *SMALL])

    assert code == 2
    assert "tracking.experiment=thrown away" in capsys.readouterr().err
    assert list(cwd.iterdir()) == []


# Sweeps and signals


def test_a_sweep_makes_a_run_of_each_combination_and_a_job_that_is_refused_does_not_keep_the_rest_from_running(
    store: str, tiny: Path, tmp_path: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    empty(folder)
    settings = ["model=local", f"model.path={tiny},{folder}", "until=load", f"tracking.uri={store}", *SMALL]

    code = _main(["-m", "strategy=detect_causal,lowering", *settings])

    reports = [json.loads(path.read_text()) for path in (cwd / "outputs").glob("*/*/report.json")]
    found = {(each["config"]["strategy"]["name"], Path(each["config"]["model"]["path"])): each for each in reports}
    assert code == 1 and len(reports) == 4
    for strategy in ("detect_causal", "lowering"):
        assert found[strategy, tiny]["status"] == "ok"
        failed = found[strategy, folder]
        assert (failed["status"], failed["failure"]["kind"], failed["failure"]["stage"]) == (
            "failed",
            "refused",
            "load",
        )
    assert "holds no weights" in capsys.readouterr().err


def is_closed_as_interrupted(outcome: Outcome, by: str, store: str) -> None:
    kept = mlflow_run(store, outcome)
    assert failure(outcome)[1] == "interrupted" and by in outcome.report["failure"]["message"]
    assert kept.info.status == "KILLED" and kept.data.tags["failure.kind"] == "interrupted"
    assert "report.json" in artifacts(store, kept.info.run_id)


@pytest.mark.slow  # as at four moments in test_endings
def test_ctrl_c_ends_a_run_with_code_130_and_its_report_and_mlflow_run_are_closed(
    store: str, one_layer: Path, tmp_path: Path
) -> None:
    process = start("model=local", f"model.path={one_layer}", f"tracking.uri={store}", *SMALL, cwd=tmp_path)
    while not list(tmp_path.glob("outputs/*/*/graph_before.txt")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)

    assert process.returncode == 130
    is_closed_as_interrupted(outcome_in(tmp_path / "outputs"), "Ctrl-C", store)


class Killed(StageDisplay):
    """Has the process terminated while TensorRT builds."""

    def steps(self, message: str, done: int, total: int) -> bool:
        signal.raise_signal(signal.SIGTERM)
        return True


def test_sigterm_during_an_engine_build_stops_it_and_closes_the_run(
    store: str, one_layer: Path, tmp_path: Path
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    interrupts.install()
    try:
        with pytest.raises(SystemExit) as left:
            do(store, tmp_path, one_layer, *SMALL, display=Killed(Console(file=io.StringIO())))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    outcome = outcome_in(tmp_path)
    assert left.value.code == 143 and failure(outcome)[0] == "build"
    is_closed_as_interrupted(outcome, "SIGTERM", store)


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """``python -m pipeline`` in a process of its own, with an engine store of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", f"store.folder={cwd}/engines", *arguments],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
