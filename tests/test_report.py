"""report.json: what its schema says, that schema 1 is read as well, and what a failure leaves in it."""

from __future__ import annotations

import copy
import io
import json
import math
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import save_tiny_llama
from reports import ROOT, SCHEMA, conforms, keep, real
from rich.console import Console
from runs import do, failure
from simulated import MS, QUIET, SimulatedClock
from simulated_prompts import SimulatedRunner, prompts
from test_benchmark_generate import SimulatedGenerator

from passes.errors import RunError
from pipeline.__main__ import compose_config
from pipeline.compare.baseline import against_baseline, parse_baseline
from pipeline.compare.labels import sections
from pipeline.compare.rows import row
from pipeline.compare.sources import read, read_file
from pipeline.config.schema import BenchmarkConfig, BenchmarkShape, GenerateShape
from pipeline.engine.session import Held
from pipeline.host.plain_json import from_json, to_json
from pipeline.measure import stage
from pipeline.measure.prompt import measure
from pipeline.measure.sections import Summary
from pipeline.measure.until_settled import BenchmarkResult
from pipeline.model.load import LoadedModel
from pipeline.record.console import StageDisplay
from pipeline.record.environment import environment
from pipeline.record.report import SCHEMA as NUMBER
from pipeline.record.report import (
    is_sealed,
    read_report,
    times_count,
    upgraded,
    verified_by,
    write_json,
    write_report,
)
from pipeline.record.sections import Failure, Report, new_report
from pipeline.record.unfinished import LOCK, STATE
from pipeline.tracking.recovery import recover
from pipeline.tracking.runs import start
from pipeline.verify.sections import Deviation, JudgedCase, Verification, WorstBlock, WorstPosition

RESULTS = Path(__file__).parent / "kept_reports" / "h200_rtx_1_4_generate"

jsonschema = pytest.importorskip("jsonschema", reason="a GPU host without a package index may lack it")


# The schema


def test_the_schema_in_the_docs_is_what_the_command_prints() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "pipeline.record.schema"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8") == made.stdout and made.stderr == ""


def test_the_schema_describes_every_section_and_knows_every_key() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["properties"]) == {field.name for field in fields(Report)} == set(SCHEMA["required"])
    sections = {"Attention", "Engine", "Verification", "Benchmark", "Model", "Environment", "Failure", "StoreLookup"}
    assert sections <= set(SCHEMA["$defs"])
    for name, section in SCHEMA["$defs"].items():
        assert section["description"] and "(" not in section["description"].partition(" ")[0], name
        assert set(section["required"]) == set(section["properties"]) and not section["additionalProperties"]
    assert "Frobenius" in SCHEMA["$defs"]["JudgedCase"]["properties"]["relative_error"]["description"]


def test_a_report_that_lacks_a_key_has_one_too_many_or_another_type_does_not_conform(tmp_path: Path) -> None:
    made = to_json(new_report(compose_config([])))
    write_report(tmp_path / "report.json", made)
    conforms(tmp_path)

    less = {key: value for key, value in made.items() if key != "decode"}
    for wrong in (less, made | {"more": 1}, made | {"notes": "one"}, made | {"schema": 1}, made | {"engine": {}}):
        write_report(tmp_path / "report.json", wrong)
        with pytest.raises(jsonschema.ValidationError):
            conforms(tmp_path)


# To JSON, and back


def judged(error: float) -> JudgedCase:
    numbers: dict[str, Any] = {"relative_error": error, "max_abs": 1.0, "cosine": 1.0, "kl": 0.0}
    numbers |= {"top1_agreement": 1.0, "unexplained_flips": 0}
    return JudgedCase(
        name="length_7", length=7, padding="none", sample=0, **numbers, tolerance=0.1, allowed_kl=0.1,
        positions_judged=1, positions_failed=0, worst_position=WorstPosition(0, 6, "kl", error, 1.0),
        worst_block=WorstBlock(0, 127, error, 1.0), passed=False, yardsticks={"pytorch": Deviation(**numbers)},
    )  # fmt: skip


def test_what_is_not_there_and_what_is_no_number_are_null() -> None:
    section = to_json(Verification("graph", "fp16", 3.0, (judged(math.nan),), False))

    assert section["answer"] is section["generation"] is section["outside"] is None and section["stored"] is False
    (case,) = section["cases"]
    assert case["relative_error"] is None and case["yardsticks"]["pytorch"]["relative_error"] is None
    assert list(case)[:2] == ["name", "length"]
    assert to_json(Summary(1.0, math.inf, None, None, 2, (0.5, 1.5)))["ci95"] == [0.5, 1.5]
    json.dumps(section, allow_nan=False)


def test_a_value_comes_back_from_its_json_and_an_unknown_key_is_refused() -> None:
    verification = Verification("engine", "fp16", 3.0, (judged(0.25), judged(0.5)), True)
    content = json.loads(json.dumps(to_json(verification)))

    assert from_json(Verification, content) == verification
    with pytest.raises(TypeError, match="more"):
        from_json(Verification, content | {"more": 1})


# What runs leave


class BreaksTheSecondBuild(StageDisplay):
    """Has TensorRT stop its builder as soon as a first engine lies below ``output``."""

    def __init__(self, output: Path) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.output = output

    def steps(self, message: str, done: int, total: int) -> bool:
        return not list(self.output.glob("*/*/engine.trt"))


def test_an_engine_that_was_built_before_the_second_failed_is_in_the_report(store: str, tmp_path: Path) -> None:
    model, display = save_tiny_llama(tmp_path / "model", num_hidden_layers=1), BreaksTheSecondBuild(tmp_path / "runs")
    asked = ["cache=in_engine", "shape.max=16", "benchmark=none"]
    outcome = do(store, display.output, model, *asked, display=display)

    assert failure(outcome) == ("build", "build")
    first, second = outcome.report["engine"], outcome.report["decode"]["engine"]
    assert first["file"] == "engine.trt" and first["bytes"] == (outcome.folder / "engine.trt").stat().st_size
    assert second["layers"] > 0 and second["file"] is None and not (outcome.folder / "decode.trt").exists()
    assert outcome.report["decode"]["attention"]["calls"] and outcome.report["verify"] is None


def test_prompts_that_were_timed_are_kept_where_the_generation_fails_and_are_left_out_where_there_are_none() -> None:
    model = tiny.model("llama")
    loaded = LoadedModel(model, None, "tiny", "", None, None, 1, "random")
    asked = BenchmarkConfig(
        "generate", [BenchmarkShape(1, 32)], min_seconds=0.0, min_generations=2, generate=GenerateShape(1, 16, 5)
    )

    def steps(asked: BenchmarkConfig, lost: int) -> Iterator[BenchmarkResult]:
        clock = SimulatedClock()
        return stage.measure(
            SimulatedRunner(clock), SimulatedGenerator(clock, lost=lost), loaded, asked, logits="last",
            precision="fp16", seed=0, cached=True, waiting=(), clock=clock,
        )  # type: ignore[arg-type]  # fmt: skip

    first, both = steps(asked, lost=0)
    assert first.benchmark.generate is None and set(first.samples) == {"prefill"}
    assert both.benchmark.prefill == first.benchmark.prefill and both.benchmark.generate is not None
    assert both.benchmark.tokens == "random, seeded" and set(both.samples) == {"prefill", "generate", "decode"}

    broken = steps(asked, lost=1)
    assert next(broken).benchmark.prefill is not None
    with pytest.raises(RunError, match="the numbers are void"):
        next(broken)
    (alone,) = steps(replace(asked, shapes=[]), lost=0)
    assert alone.benchmark.prefill is None and set(alone.samples) == {"generate", "decode"}


def test_the_model_gives_up_its_weights_for_what_has_its_own() -> None:
    loaded, seen = LoadedModel(copy.deepcopy(tiny.model("llama")), None, "tiny", "", None, None, 1, "random"), []

    class Watched(SimulatedRunner):
        def prepare(self, tokens: torch.Tensor) -> None:
            seen.append(tokens.device.type)
            super().prepare(tokens)

    for held in (None, lambda: Held(0, 0)):
        clock = SimulatedClock()
        (found,) = stage.measure(
            Watched(clock), None, loaded, BenchmarkConfig("prefill", [BenchmarkShape(1, 32)], min_seconds=0.0),
            logits="last", precision="fp16", seed=0, cached=True, waiting=(), clock=clock, held=held,
        )  # type: ignore[arg-type]  # fmt: skip
        assert found.benchmark.prefill is not None
        assert {weight.is_meta for weight in loaded.model.parameters()} == {held is not None}
    assert set(seen) == {"cpu"}  # where the model was


# Schema 1


def typed_row(folder: Path, device_ms: float) -> Path:
    """A report of schema 3, of a prefill of Llama by ``lowering`` that took ``device_ms`` in simulated time."""
    asked = BenchmarkConfig("prefill", [BenchmarkShape(1, 2048)], min_seconds=0.0)
    clock = SimulatedClock()
    runner = SimulatedRunner(clock, device_ns=lambda i: round(device_ms * MS))
    timed = measure(runner, asked, prompts, clock=clock, read_state=lambda: QUIET).benchmark  # type: ignore[arg-type]
    config = compose_config(["model=llama3_1b", "model.weights=random", "strategy=lowering", "shape=static"])
    here = replace(environment(), gpu="NVIDIA H200", supported_by_vendor=False)
    made = replace(
        new_report(config),
        status="ok",
        environment=here,
        verify=Verification("engine", "fp16", 3.0, (replace(judged(0.01), passed=True),), True),
        benchmark=timed,
    )
    folder.mkdir()
    write_report(folder / "report.json", to_json(made))
    assert conforms(folder)["schema"] == NUMBER == 3
    return folder


def test_reports_of_both_schemas_stand_in_one_comparison(tmp_path: Path) -> None:
    old = keep(tmp_path / "old", real("llama3_1b-upstream"))
    assert json.loads((old / "report.json").read_text())["schema"] == 1
    rows, unreadable = read([str(old), str(typed_row(tmp_path / "new", 5.0))], "", row)
    assert unreadable == []

    (section,) = sections(rows)
    (found,) = against_baseline(section, parse_baseline("strategy:upstream", rows))
    before = real("llama3_1b-upstream")["benchmark"]["prefill"]["device_ms"]["median"]
    assert found.row.axes["strategy.name"] == "lowering" and found.verdict() == "faster"
    assert found.time is not None and found.time.low <= 5.0 / before <= found.time.high
    assert all(each.accuracy is not None and each.accuracy.passed for each in rows)


KEPT = sorted((Path(__file__).parent / "kept_reports").rglob("*.json"))
OLD = [path for path in KEPT if json.loads(path.read_text())["schema"] == 1]


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_a_raw_report_of_schema_1_reads_as_the_same_row_as_in_the_form_of_schema_3(path: Path, tmp_path: Path) -> None:
    raw = json.loads(path.read_text())
    assert raw["schema"] == 1 and upgraded(raw) == upgraded(upgraded(raw)) and upgraded(raw)["schema"] == 3
    write_report(tmp_path / path.name, upgraded(raw))

    then, now = (replace(row(read_file(each)), name="") for each in (path, tmp_path / path.name))
    assert then == now
    answer = (raw.get("verify") or {}).get("answer")
    assert answer is None or upgraded(raw)["verify"]["answer"]["candidate"] == answer["engine"]
    if then.accuracy is not None:
        (case,) = (case for case in raw["verify"]["cases"] if case["name"] == then.accuracy.case)
        assert then.accuracy.pytorch_share == case["pytorch"]["relative_error"] / case["tolerance"]


def test_a_second_engine_of_schema_1_is_where_schema_3_has_it() -> None:
    path = RESULTS / "llama3_1b-detect_causal-fp16-generate-in_engine.json"
    raw, report = json.loads(path.read_text()), read_report(path)

    assert report is not None
    assert report["decode"]["engine"] == raw["engine"]["decode"] and "decode" not in report["engine"]
    assert report["decode"]["attention"] == raw["attention"]["decode"] and "decode" not in report["attention"]
    assert report["engine"]["bytes"] == raw["engine"]["bytes"] and report["benchmark"] == raw["benchmark"]
    assert is_sealed(json.loads(path.read_text())), "reading changes nothing"


def test_an_answer_of_schema_2_is_the_candidates_and_the_rest_stays() -> None:
    answer = {"question": "?", "engine": "Paris.", "pytorch": "Paris.", "tokens_agree": True}
    verify = {"executed": "graph", "passed": True, "answer": answer, "cases": []}
    report = {"schema": 2, "status": "not_executed", "verify": verify}

    new = upgraded(report)

    assert new["verify"]["answer"] == {
        "question": "?", "candidate": "Paris.", "pytorch": "Paris.", "tokens_agree": True,
    }  # fmt: skip
    assert {**new, "verify": None} == {**report, "schema": 3, "verify": None} and report["verify"]["answer"] is answer


@pytest.mark.parametrize(
    ("verify", "failure", "by", "counts"),
    [
        ({"executed": "engine", "passed": True}, None, "engine", True),
        ({"executed": "engine", "passed": True}, {"kind": "out_of_memory"}, "engine", True),
        ({"executed": "engine", "passed": True}, {"kind": "accuracy"}, "no", False),
        ({"executed": "engine", "passed": False}, None, "no", False),
        ({"executed": "graph", "passed": True}, None, "graph", False),
        ({"executed": "graph", "passed": None}, None, "no", False),
        ({"executed": "torch_compile", "passed": True}, None, "torch_compile", True),
        (None, None, "no", False),
    ],
)
def test_what_was_verified_is_said_by_what_ran_it(verify: Any, failure: Any, by: str, counts: bool) -> None:
    report = {"verify": verify, "failure": failure}
    assert verified_by(report) == by and times_count(report) == counts


@pytest.mark.parametrize("content", ['{"schema": 4}', '{"schema": "1"}', "[]", "{", ""])
def test_a_report_of_another_schema_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    assert read_report(tmp_path / "report.json") is None


def test_an_error_of_ours_has_no_traceback_and_the_section_has_the_key() -> None:
    assert to_json(Failure("build", "build", "no")) == {
        "stage": "build", "kind": "build", "message": "no", "traceback": None,
    }  # fmt: skip


def test_a_run_that_an_older_version_left_unfinished_is_closed_in_its_own_schema(store: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = compose_config([f"tracking.uri={store}", f"output={tmp_path}", "tracking.experiment=older"])
    folder = tmp_path / "2026-01-01" / "00-00-00_older"
    folder.mkdir(parents=True)
    folder.joinpath(LOCK).touch()
    raw = json.loads((RESULTS / "llama3_1b-detect_causal-fp16-generate-in_engine.json").read_text())
    report = {**{key: value for key, value in raw.items() if key != "sha256"}, "mlflow": None}
    process = {"host": socket.gethostname(), "boot": None, "pid": 1, "started": "2026-01-01T00:00:00"}
    write_json(folder / STATE, {"process": process, "stage": "benchmark", "report": report})
    tracked = start(config, folder)
    said: list[str] = []
    recover(config, said.append)

    closed = json.loads((folder / "report.json").read_text())
    assert said == [f"{folder}: its process was killed; closed now"]
    assert closed["schema"] == 1 and is_sealed(closed) and closed["failure"]["kind"] == "killed"
    assert closed["engine"] == raw["engine"] and closed["mlflow"]["run_id"] == tracked.run_id
    kept = MlflowClient(store).get_run(tracked.run_id)
    assert kept.info.status == "KILLED"
    assert kept.data.metrics["decode.engine.bytes"] == raw["engine"]["decode"]["bytes"]
