"""A figure in prose is from a report that is in the tree, or the check says where it stands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from reports import ROOT, real

from benchmarks import figures, results, stacks
from benchmarks.figures import Said

MEDIAN = "[one benchmark.prefill.device_ms.median]"
"""Of the report below: 9.107 ms."""


@pytest.fixture
def kept(tmp_path: Path) -> list[Path]:
    """A folder with a report of this code, an older one, raw rows and a profile."""
    folder = tmp_path / "kept"
    folder.mkdir()
    report = real("llama3_1b-detect_causal")
    (folder / "older.json").write_text(json.dumps(report))
    report["environment"]["code"] = stacks.this_code()
    (folder / "one.json").write_text(json.dumps(report))
    rows = [
        {"environment": report["environment"]},
        *({"form": form, "n": 8, "us": us} for form, us in (("a b", 12.34), ("c", 5))),
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(Path(__file__).parent / "kept_profiles" / "llama3_1b-decode.json", folder)
    return [folder]


def said(text: str, kept: list[Path], name: str = "page.md") -> Said:
    page = kept[0].parent / name
    page.write_text(text)
    return figures.check([page], kept)


def test_every_figure_of_the_readme_and_the_docs_is_from_a_report() -> None:
    assert ROOT / "README.md" in figures.pages() and ROOT / "docs" / "results.md" in figures.pages()
    assert figures.check().wrong == []


def test_the_check_says_what_is_not_so_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["results", "--check"])
    assert results.main() == 0
    assert all(
        line.startswith(("docs/", "README")) and "older code" in line for line in capsys.readouterr().out.splitlines()
    )

    page = tmp_path / "page.md"
    page.write_text("It takes 1.2 ms.\n")
    monkeypatch.setattr(figures, "pages", lambda: [page])
    assert results.main() == 1
    assert "page.md:1: 1.2 ms: is from no report" in capsys.readouterr().out


def test_a_figure_without_a_report_is_named_with_its_file_and_line(kept: list[Path]) -> None:
    text = "# Title\n\nFast.\n\n* A point of\n  two lines, 9.1 ms,\n  and 3 more.\n\n| a | 2.5 GB |\n"
    assert said(text, kept).wrong == [
        "page.md:6: 9.1 ms: is from no report (see benchmarks/figures.py)",
        "page.md:9: 2.5 GB: is from no report (see benchmarks/figures.py)",
    ]


@pytest.mark.parametrize(
    "text",
    [
        f"It takes 9.1 ms.\n<!-- figures: 9.1 = {MEDIAN} -->",
        f"It takes 9.11 ms. <!-- figures: 9.11 ms = {MEDIAN} -->",
        f"It takes 9107 us.\n<!-- figures: 9107 = {MEDIAN} * 1000 -->",
        f"* Half of it\n  is 4.6 ms, the file has 93 MB.\n  <!-- figures: 4.6 = {MEDIAN} / 2;\n  93 MB: says PyPI -->",
        f"It is 1.00 times as fast.\n<!-- figures: 1.00 = {MEDIAN} / {MEDIAN.replace('one', 'kept/one.json')} -->",
        "It takes 12 and 5.0 us.\n<!-- figures: 12 = [rows.jsonl us 'form=a b' n=8]; 5.0 = [rows.jsonl us form=c] -->",
        "Products take 991 us.\n<!-- figures: 991 = [llama3_1b-decode.json products] -->",
    ],
)
def test_a_figure_that_is_what_its_report_says_is_right(text: str, kept: list[Path]) -> None:
    assert said(text, kept).wrong == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"It takes 9.2 ms.\n<!-- figures: 9.2 = {MEDIAN} -->", "the report says 9.10666"),
        (f"It takes 9.10 ms.\n<!-- figures: 9.10 = {MEDIAN} -->", "the report says 9.10666"),
        ("It takes 9.1 ms.\n<!-- figures: 9.1 = [two benchmark.prefill] -->", "two: no such report"),
        ("It takes 9.1 ms.\n<!-- figures: 9.1 = [one benchmark.prefill] -->", "no number there"),
        ("It takes 9.1 ms.\n<!-- figures: 9.1 = [one benchmark.decode.device_ms] -->", "no number there"),
        ("It takes 5 us.\n<!-- figures: 5 = [rows.jsonl us n=8] -->", "2 rows of rows.jsonl are so"),
        ("It takes 5 us.\n<!-- figures: 5 = open('x') -->", "is no arithmetic"),
        ("It takes 5 us.\n<!-- figures: 5 = 2 + 3 -->", "names no report"),
        (f"It takes 9.1 ms.\n<!-- figures: 9.1 = {MEDIAN}; 9 = 9 -->", "9: stands in the comment and not in the text"),
        (f"It takes 9.1 ms.\n\n<!-- figures: 9.1 = {MEDIAN} -->", "9.1 ms: is from no report"),
        ("It takes 9.1 ms, or 7 ms.\n<!-- figures: 7: guessed -->", "9.1 ms: is from no report"),
        ("It takes 9.1 ms.\n<!-- figures: 9.1 GB: a size -->", "9.1 ms: is from no report"),
    ],
)
def test_a_figure_that_is_not_what_its_report_says_is_wrong(text: str, reason: str, kept: list[Path]) -> None:
    assert any(reason in line for line in said(text, kept).wrong)


def test_a_comment_that_cannot_be_read_says_how_it_is_written(kept: list[Path]) -> None:
    with pytest.raises(ValueError, match="is written FIGURE = EXPRESSION or FIGURE: WHY"):
        said("It takes 9.1 ms.\n<!-- figures: measured -->", kept)


def test_figures_of_older_code_are_named_and_are_no_fault(kept: list[Path]) -> None:
    text = f"9.1 ms, then 9.107 ms.\n<!-- figures: 9.1 = {MEDIAN}; 9.107 = {MEDIAN.replace('one', 'older')} -->"
    found = said(text, kept)
    assert (found.wrong, found.older) == ([], ["page.md: of older code: 9.107"])


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("from 1131 and 1511 to 1022 us", ["1131", "1511", "1022"]),
        (
            "2 to 5 times, 88, 51 and 92 us, 4.23 TB/s, 1,500 ms, 12 %",
            ["2", "5", "88", "51", "92", "4.23", "1,500", "12"],
        ),
        ("10-20 ms, 3–4 GB, 0.5 s, 1.5×, 2 per cent", ["10", "20", "3", "4", "0.5", "1.5", "2"]),
        ("2048 tokens, 1 × 2048, a 95 % interval, (95 %), TensorRT 1.6, an H100 of NVIDIA H100 80GB", []),
        ("`8 ms` in code, version 1.6.1 s, mm16, 4x4, [a 5](x)", []),
    ],
)
def test_what_is_a_figure_is_a_number_with_a_unit_of_measurement(
    text: str, numbers: list[str], kept: list[Path]
) -> None:
    assert [line.split(": ")[1].split()[0] for line in said(text, kept).wrong] == numbers


def test_code_and_tables_that_a_command_makes_hold_no_figures_of_prose(kept: list[Path]) -> None:
    text = "```sh\nsleep 5 ms\n```\n\n| made | 5 ms |\n\nwritten: 6 ms\n"
    assert len(said(text, kept).wrong) == 2
    assert said(text, kept, "results.md").wrong == [
        "page.md:7: 6 ms: is from no report".replace("page", "results") + " (see benchmarks/figures.py)"
    ]
