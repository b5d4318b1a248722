"""Models on which dropping the mask is wrong: kept, forced, and dropped on the user's word with the word checked."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TINY_LLAMA
from rich.console import Console
from runs import DONE, do, failure, mlflow_run, outcome_in
from torch import Tensor

from passes.errors import RunError, UserError
from passes.proof.conditions import CONDITIONS, LARGEST_POSITION
from pipeline.__main__ import _main, compose_config
from pipeline.config.choices import ASSUMPTIONS
from pipeline.config.schema import ShapeConfig
from pipeline.config.verification import VerifyConfig
from pipeline.engine import guard
from pipeline.record.console import StageDisplay
from pipeline.tracking import runs
from pipeline.verify.cases import Case, case_inputs, cases, split

BOTH = ["input_ids", "attention_mask", "position_ids"]


class Wrong(NamedTuple):
    """A model on which dropping the mask is wrong, and a case of the verification that shows it."""

    architecture: dict[str, Any]
    inputs: str
    right: str
    """The case on which it makes no difference."""
    wrong: str


WRONG = {
    "window": Wrong({"model_type": "mistral", "sliding_window": 5}, "[input_ids]", "length_2", "length_16"),
    "packed": Wrong({}, "[input_ids,position_ids]", "length_16", "length_16_packed"),
    "padded": Wrong({}, "[input_ids,attention_mask]", "length_16", "length_16_left_padding"),
}


def model_of(folder: Path, **architecture: Any) -> Path:
    """A folder with the config of a tiny model of one layer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA | {"num_hidden_layers": 1} | architecture))
    return folder


def settings(inputs: str, *more: str) -> list[str]:
    small = ["shape.max=16", "shape.exact=[]", "precision=fp32", "benchmark=none"]
    return ["model.weights=random", f"model.inputs={inputs}", *small, *more]


@pytest.mark.parametrize("strategy", ["detect_causal", pytest.param("lowering", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "packed" else []) for name in WRONG]
)
def test_a_mask_that_must_stay_stays_and_the_engine_is_verified_where_it_matters(
    name: str, strategy: str, store: str, tmp_path: Path
) -> None:
    case = WRONG[name]
    model = model_of(tmp_path / "model", **case.architecture)

    report = do(store, tmp_path / "runs", model, f"strategy={strategy}", *settings(case.inputs)).report

    assert report["status"] == DONE, report["failure"]
    assert report["attention"]["summary"]["by_action"] == {"native_window" if name == "window" else "native_mask": 1}
    masked, causal = (report["engine"][f"iattention_{which}"] for which in ("masked", "causal"))
    assert (masked, causal) == ((1, 1) if name == "window" else (1, 0))  # a window's first tokens see all of their past
    passed = {row["name"]: row["passed"] for row in report["verify"]["cases"]}
    assert passed[case.right] and passed[case.wrong] and report["verify"]["outside"] is None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "padded" else [pytest.mark.slow]) for name in WRONG]
)
def test_a_mask_dropped_against_the_proof_fails_verification_and_its_engine_is_not_handed_out(
    name: str, store: str, tmp_path: Path, cwd: Path
) -> None:
    case = WRONG[name]
    model = model_of(tmp_path / "model", **case.architecture)

    forced = ["strategy=lowering", "strategy.unproven=force", f"tracking.uri={store}"]
    engines = tmp_path / "engines"
    code = _main(["model=local", f"model.path={model}", f"store.folder={engines}", *forced, *settings(case.inputs)])

    assert code == 1
    assert [path for path in engines.iterdir() if path.is_dir()] == []  # a failed engine is never kept
    outcome = outcome_in(cwd / "outputs")
    report, kept = outcome.report, mlflow_run(store, outcome)
    assert failure(outcome) == ("verify", "accuracy")
    assert not report["verify"]["passed"] and report["benchmark"] is None
    passed = {row["name"]: row["passed"] for row in report["verify"]["cases"]}
    assert passed[case.right] and not passed[case.wrong]
    assert {call["proof"] for call in report["attention"]["calls"]} == {"unproved"}
    (note,) = (note for note in report["notes"] if "mask dropped unproved" in note)
    assert note.endswith(report["attention"]["calls"][0]["counterexample"]["text"])
    assert kept.info.status == "FAILED" and kept.data.tags["failure.kind"] == "accuracy"
    assert kept.data.metrics["verify.passed"] == 0
    assert not any(key.startswith("benchmark") for key in kept.data.metrics)
    with pytest.raises(UserError, match="did not pass verification"):
        runs.fetch_engine(kept.info.run_id, store)


# Assumed: dropped on the user's word


@pytest.mark.parametrize(
    ("name", "condition", "more", "guarded", "outside"),
    [
        ("padded", "no_padding", ["strategy=detect_causal"], True, ["length_7_left_padding", "length_16_left_padding"]),
        pytest.param(
            "padded", "no_padding", ["strategy=lowering", "shape=static"], True, ["length_16_left_padding"],
            marks=pytest.mark.slow,
        ),
        ("packed", "contiguous_positions", ["strategy.guard=false"], False, ["length_7_packed", "length_16_packed"]),
    ],
)  # fmt: skip
def test_an_assumption_is_judged_inside_shown_outside_recorded_and_guarded(
    name: str, condition: str, more: list[str], guarded: bool, outside: list[str], store: str, tmp_path: Path
) -> None:
    case = WRONG[name]
    model = model_of(tmp_path / "model", **case.architecture)

    outcome = do(store, tmp_path / "runs", model, f"strategy.assume=[{condition}]", *settings(case.inputs, *more))

    report = outcome.report
    assert report["status"] == DONE, report["failure"]
    assert report["attention"]["summary"]["assumed"] == [condition]
    assert (report["engine"]["iattention_causal"], report["engine"]["iattention_masked"]) == (1, 0)
    judged = [row["name"] for row in report["verify"]["cases"]]
    assert report["verify"]["passed"] and case.right in judged and not set(outside) & set(judged)
    shown = report["verify"]["outside"]
    assert [row["name"] for row in shown["cases"]] == outside and shown["assumed"] == [condition]
    assert all(set(row) == set(report["verify"]["cases"][0]) for row in shown["cases"])
    assert shown["worst"]["relative_error"] == max(row["relative_error"] for row in shown["cases"])
    assert shown["worst"]["relative_error"] > 1e4 * max(row["tolerance"] for row in shown["cases"])
    checked = "the runtime checks it" if guarded else "nothing checks it (strategy.guard=false)"
    assert any(condition in note and checked in note for note in report["notes"])
    assert mlflow_run(store, outcome).data.metrics["verify.outside.worst.relative_error"] > 0.01
    console = Console(file=io.StringIO(), width=200)
    StageDisplay(console).summary(report, outcome.folder, None)
    assert f"{condition}: not judged, {len(outside)} cases" in console.file.getvalue()  # type: ignore[attr-defined]

    # What an engine that is loaded again checks.
    conditions = guard.guarded(json.loads((outcome.folder / "engine.json").read_text()))
    assert conditions == ((condition,) if guarded else ())
    names, tokens = case.inputs.strip("[]").split(","), torch.zeros(1, 16, dtype=torch.int64)
    guard.check(conditions, case_inputs(Case("", 16, "none", 0), names, tokens)[0])
    broken = Case("", 16, "left" if name == "padded" else "none", 0, "packed" if name == "packed" else "counted")
    with pytest.raises(RunError, match=ASSUMPTIONS[condition]) if guarded else nullcontext():
        guard.check(conditions, case_inputs(broken, names, tokens)[0])


def test_an_assumption_on_whose_word_nothing_is_dropped_is_said_and_not_recorded(store: str, tmp_path: Path) -> None:
    inputs = f"[{','.join(BOTH)}]"  # with an attention mask, the mask does not read the positions
    more = ["strategy.assume=[contiguous_positions]", "until=strategy"]

    report = do(store, tmp_path / "runs", model_of(tmp_path / "model"), *settings(inputs, *more)).report

    assert report["attention"]["summary"] == report["attention"]["summary"] | {"assumed": [], "by_mask": {"padding": 1}}
    assert any("no mask was dropped on the word of contiguous_positions" in note for note in report["notes"])


def test_the_conditions_of_the_settings_the_prover_and_the_guard_are_the_same() -> None:
    assert set(ASSUMPTIONS) == set(CONDITIONS) == set(guard.WANTED)


def test_both_conditions_compose_and_the_guard_is_on_unless_turned_off() -> None:
    assume = "strategy.assume=[contiguous_positions,no_padding]"
    for strategy in ("detect_causal", "lowering"):
        config = compose_config([f"strategy={strategy}", assume, f"model.inputs=[{','.join(BOTH)}]"])
        assert config.strategy.assume == ["contiguous_positions", "no_padding"] and config.strategy.guard is True
    assert compose_config(["strategy.guard=false"]).strategy.guard is False


# The guard


def rows(*values: list[int]) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("no_padding", rows([1, 1, 1], [1, 1, 1])),
        ("no_padding", rows([1])),
        ("no_padding", rows([1, 1, 1]).bool()),
        ("contiguous_positions", rows([0, 1, 2], [0, 1, 2])),
        ("contiguous_positions", rows([5, 6, 7], [0, 1, 2])),  # a piece of a longer text
        ("contiguous_positions", rows([3])),
        ("contiguous_positions", rows([LARGEST_POSITION, LARGEST_POSITION + 1])),
    ],
)
def test_inputs_that_keep_a_condition_pass_the_guard(condition: str, kept: Tensor) -> None:
    guard.check([condition], {ASSUMPTIONS[condition]: kept})


@pytest.mark.parametrize(
    ("condition", "broken", "said"),
    [
        (
            "no_padding",
            rows([1, 1, 1], [1, 0, 0]),
            "attention_mask is 0 at row 1, token 1, where no_padding asks for 1",
        ),
        ("no_padding", rows([0]), "attention_mask is 0 at row 0, token 0"),
        ("contiguous_positions", rows([0, 1, 2], [0, 1, 0]), "position_ids is 0 at row 1, token 2, where cont"),
        ("contiguous_positions", rows([0, 0, 1]), "position_ids is 0 at row 0, token 1"),
        ("contiguous_positions", rows([0, 2, 3]), "asks for 1"),
        ("contiguous_positions", rows([-1, 0, 1]), "position_ids is -1 at row 0, token 0"),
        ("contiguous_positions", rows([LARGEST_POSITION + 1]), f"asks for {LARGEST_POSITION}"),
    ],
)
def test_the_guard_names_input_condition_and_the_first_place_that_breaks_it(
    condition: str, broken: Tensor, said: str
) -> None:
    with pytest.raises(RunError, match=said) as raised:
        guard.check([condition], {ASSUMPTIONS[condition]: broken})

    assert raised.value.kind == "assumption" and f"strategy.assume=[{condition}]" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_manifest_says_what_is_checked_and_an_older_one_has_nothing_to_check() -> None:
    assert guard.guarded({"assumed": ["no_padding"], "guard": True}) == ("no_padding",)
    assert guard.guarded({"assumed": ["no_padding"], "guard": False}) == ()
    assert guard.guarded({}) == ()
    with pytest.raises(UserError, match=r"assumed=no_nonsense.*known are contiguous_positions, no_padding"):
        guard.guarded({"assumed": ["no_nonsense"], "guard": True})


# The cases


def of_length(length: int, names: list[str], logits: str = "last") -> list[Case]:
    return cases(VerifyConfig([length]), ShapeConfig("dynamic", 3, 1, 16, 16), names, logits)


def test_positions_as_an_input_are_verified_on_packed_documents() -> None:
    names = ["input_ids", "position_ids"]
    assert [case.name for case in of_length(7, names)] == ["length_7", "length_7_packed"]
    assert [case.name for case in of_length(7, ["input_ids"])] == ["length_7"]
    assert [case.name for case in of_length(2, names)] == ["length_2"]

    inputs, padding = case_inputs(of_length(7, names)[1], names, torch.zeros(3, 7, dtype=torch.int64))

    packed, counted = [0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]
    assert inputs["position_ids"].tolist() == [packed, counted, packed] and padding is None


@pytest.mark.parametrize(
    ("conditions", "inside"),
    [
        ([], ["", "_left_padding", "_right_padding", "_packed"]),
        (["no_padding"], ["", "_packed"]),
        (["contiguous_positions"], [""]),  # the positions of padding repeat
    ],
)
def test_cases_lie_inside_an_assumption_if_their_inputs_keep_it(conditions: list[str], inside: list[str]) -> None:
    every = of_length(7, BOTH, "all")

    kept, broken = split(every, conditions, BOTH, batch=3)

    assert [case.name for case in kept] == [f"length_7{suffix}" for suffix in inside]
    assert [case for case in every if case not in kept] == broken
