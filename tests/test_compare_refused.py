"""The comparison of reports: what it refuses, and what it makes of very many."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from reports import REAL, keep, real, timed, varied

from pipeline.compare.__main__ import main
from pipeline.record.report import is_sealed, write_report

# ---- what is refused: one line, exit code 2, nothing written


def cut_off(folder: Path) -> None:
    path = keep(folder, real("llama3_1b-lowering")) / "report.json"
    path.write_text(path.read_text()[:-100])


def edited(folder: Path) -> None:
    path = folder / "report.json"
    folder.mkdir()
    write_report(path, real("llama3_1b-lowering"))
    assert is_sealed(json.loads(path.read_text()))
    path.write_text(path.read_text().replace('"median": 9.13', '"median": 5.13'))


@pytest.mark.parametrize(("make", "says"), [
    (cut_off, "is cut off or no JSON"),
    (edited, "was changed after the run"),
    (lambda f: keep(f, real("llama3_1b-lowering") | {"schema": 7}), "schema=7: only reports of schema 1"),
    (lambda f: keep(f, real("llama3_1b-lowering") | {"status": "great"}), "status=great: allowed are ok"),
    (lambda f: keep(f, real("llama3_1b-lowering") | {"config": None}), "is no report of a run"),
    (lambda f: keep(f, real("llama3_1b-lowering"), {"prefill": {"device_ms": ["x"]}}), "is no report of a run"),
    (lambda f: keep(f, real("llama3_1b-lowering") | {"mlflow": "yes"}), "mlflow=yes: is no run's"),
    (lambda f: keep(f, []), "holds no report, but a JSON list"),
    (lambda f: f.mkdir(), "no report.json in this folder"),
    (lambda f: None, "no such file or folder, and no MLflow store"),
])  # fmt: skip
def test_what_is_no_report_is_refused_in_one_line(compare, tmp_path, monkeypatch, make, says):
    monkeypatch.chdir(tmp_path)
    keep(tmp_path / "good", real("llama3_1b-upstream"))
    make(tmp_path / "bad")

    code, html, _, said = compare("good", "bad")

    assert (code, html) == (2, "")
    assert said.startswith("error: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize(("arguments", "says"), [
    (["--fail-if-slower", "five"], "five: is no percentage; write it as 5%"),
    (["--fail-if-slower", "-5%"], "expected one argument"),
    (["--fail-if-slower", "5%"], "than what?"),
    (["--baseline", "upstream"], "is written AXIS:VALUE"),
    (["--baseline", "weather:fine"], "no axis weather; these reports have "),
    (["--baseline", "strategy:fast"], "strategy here is decompose, detect_causal, lowering, mask_input, upstream"),
    (["--baseline", "strategy:upstream,backend:eager"], "no report has all of it together"),
    (["--against", "nowhere"], "nowhere: no such file or folder"),
    (["--mlflow-ui", "javascript:alert(1)"], "is no address"),
    (["--colour"], "unrecognized arguments: --colour"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_line(compare, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)

    code, html, _, said = compare(REAL, *arguments)

    assert (code, html) == (2, "")
    assert says in said and said.count("\n") == 1


def test_reports_that_share_no_row_cannot_be_held_against_each_other(compare, tmp_path):
    now, then = keep(tmp_path / "now", real("llama3_1b-eager")), keep(tmp_path / "then", real("qwen3_0_6b-lowering"))

    code, _, _, said = compare(now, "--against", then)

    assert code == 2 and "nothing to compare" in said


@pytest.mark.parametrize(("output", "says"), [("page.pdf", "ends in .html"), ("file/page.html", "cannot be written")])
def test_an_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys, output, says):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()

    assert main([str(REAL), "-o", output]) == 2
    assert says in capsys.readouterr().err


def test_the_page_lies_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    varied(Path("outputs"))  # what is compared when nothing is named

    assert main([]) == 0 and main(["-o", "pages/mine.html"]) == 0

    made = {"comparison.html", "comparison.md", "pages/mine.html", "pages/mine.md"}
    assert all(Path(name).stat().st_size > 1000 for name in made)


# ---- many


def test_five_hundred_reports_take_at_most_ten_seconds(compare, tmp_path):
    reports = [json.loads(path.read_text()) for path in sorted(REAL.glob("*.json"))]
    for i in range(500):
        report = timed(reports[i % len(reports)], 1 + i / 1000)
        report["config"]["shape"]["batch"] = 1 + i // len(reports)
        keep(
            tmp_path / "runs" / str(i), report, {"prefill": {"device_ms": [9 + (i * j % 97) / 100 for j in range(200)]}}
        )

    started = time.perf_counter()
    code, html, _, _ = compare(tmp_path / "runs", "--baseline", "strategy:upstream")
    seconds = time.perf_counter() - started

    assert code == 0 and "Comparison of 500 runs" in html
    assert seconds < 10


@pytest.mark.parametrize("make", [cut_off, edited, lambda f: keep(f, real("llama3_1b-lowering") | {"config": None})])
def test_reports_that_cannot_be_read_are_named_and_left_out_and_the_others_are_compared(compare, tmp_path, make):
    keep(tmp_path / "all" / "good", real("llama3_1b-upstream"))
    make(tmp_path / "all" / "bad")

    code, html, markdown, said = compare(tmp_path / "all")

    assert code == 0 and said.count("\n") == 1
    assert said.startswith(f"unreadable: {tmp_path}/all/bad/report.json: ")
    assert "Comparison of 1 run" in html and "left out, unreadable:" in html and "left out, unreadable:" in markdown


def test_a_folder_of_which_no_report_can_be_read_is_refused_in_one_line(compare, tmp_path):
    for name in ("one", "two"):
        cut_off(tmp_path / "all" / name)

    code, html, _, said = compare(tmp_path / "all")

    assert (code, html) == (2, "") and said.startswith("error: ") and said.count("\n") == 1
