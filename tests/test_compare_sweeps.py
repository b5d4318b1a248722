"""Reports of several lengths or batches: one chart with a line for each way, and who wins where."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from reports import keep
from swept_reports import LENGTHS, TIMES, at, batches, dynamic_lengths, static_lengths

from pipeline.compare.__main__ import main
from pipeline.compare.labels import Section, sections
from pipeline.compare.questions import Sweep, single, sweeps
from pipeline.compare.rows import row
from pipeline.compare.sources import read


def section(folder: Path) -> Section:
    rows, unreadable = read([str(folder)], "", row)
    assert not unreadable
    (found,) = sections(rows)
    return found


def medians(sweep: Sweep) -> dict[str, dict[int, float]]:
    return {line.label: {size: line.median(size) for size in line.points} for line in sweep.lines}


@pytest.mark.parametrize("make", [static_lengths, dynamic_lengths])
def test_lengths_make_one_chart_with_a_line_for_each_way_however_the_engines_were_built(tmp_path: Path, make) -> None:
    found = section(make(tmp_path))
    (sweep,) = sweeps(found)

    assert sweep.title == "A prompt, by its length" and sweep.sizes == LENGTHS
    assert medians(sweep) == {
        name: pytest.approx(TIMES[key])
        for name, key in (
            ("torch.compile", "torch_compile"),
            ("detect_causal", "detect_causal"),
            ("upstream", "upstream"),
        )
    }
    # A chart of one length is drawn only where it has a row that is on no line.
    assert [measure.input_length for measure in single(found, [sweep])] == ([2048] if make is static_lengths else [])


def test_engines_of_one_length_and_those_of_every_length_are_lines_of_their_own(tmp_path: Path) -> None:
    static_lengths(tmp_path / "static"), dynamic_lengths(tmp_path / "dynamic")
    (sweep,) = sweeps(section(tmp_path))

    assert set(medians(sweep)) == {
        f"{name}, {kind} length" for name in ("detect_causal", "upstream", "torch.compile") for kind in ("one", "any")
    }


def test_batches_of_a_generation_make_a_chart_for_each_clock_and_lengths_are_not_mixed_with_them(
    tmp_path: Path,
) -> None:
    static_lengths(tmp_path / "lengths"), batches(tmp_path / "batches")
    found = sweeps(section(tmp_path))

    titles = [each.title for each in found]
    assert titles == [
        "Generation, 2048 tokens in, 128 out, by batch",
        "Time to first token, 2048 tokens in, 128 out, by batch",
        "Time per output token, 2048 tokens in, 128 out, by batch",
        "A prompt, by its length",
        "A prompt, 2048 tokens, by batch",
    ]
    assert medians(found[2])["detect_causal, cache in the engine"] == pytest.approx({1: 1.1, 4: 1.1, 16: 1.1})
    assert medians(found[2])["upstream"] == pytest.approx({1: 21.0, 4: 84.0, 16: 336.0})


def test_repetitions_of_a_length_are_one_point_at_their_mean(tmp_path: Path) -> None:
    for i, ms in enumerate((8.0, 9.0)):
        keep(tmp_path / f"{i}", at("detect_causal", ms, 2048))
    keep(tmp_path / "short", at("detect_causal", 1.4, 128))
    (sweep,) = sweeps(section(tmp_path))

    assert medians(sweep) == {"detect_causal": pytest.approx({128: 1.4, 2048: 8.5})}


@pytest.fixture
def page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def made(folder: Path, *arguments: str) -> tuple[str, str]:
        assert main([str(folder), "-o", str(tmp_path / "page.html"), *arguments]) == 0
        capsys.readouterr()
        return tuple((tmp_path / name).read_text() for name in ("page.html", "page.md"))  # type: ignore[return-value]

    return made


def curves(html: str, title: str = "A prompt, by its length") -> str:
    (found,) = (c for c in re.findall(r'<figure class="curves".*?</figure>', html, re.S) if f"<h3>{title}</h3>" in c)
    return str(found)


def test_the_verdict_of_a_sweep_says_who_wins_where_and_how_many_times_as_fast_at_both_ends(page, tmp_path) -> None:
    _, markdown = page(static_lengths(tmp_path / "runs"))

    # detect_causal within 3 % of torch.compile at 8192 tokens, and beaten at 16384 alone
    assert (
        "A prompt, by its length: **detect_causal**: 1.40 to 101 ms; torch.compile at 16384 tokens; "
        "1.36× to 0.96× (128 to 16384 tokens) as fast as torch.compile; "
        "1.07× to 9.80× (128 to 16384 tokens) as fast as upstream."
    ) in markdown


def test_a_sweep_is_compared_with_the_baseline_that_was_asked_for(page, tmp_path) -> None:
    html, markdown = page(static_lengths(tmp_path / "runs"), "--baseline", "strategy:upstream")

    assert "1.07× to 9.80× (128 to 16384 tokens) as fast as upstream." in markdown
    assert "×: times as fast as upstream" in curves(html) and "as fast as torch.compile" not in curves(html)


def test_a_reference_with_another_cache_is_called_so(page, tmp_path) -> None:
    _, markdown = page(batches(tmp_path / "runs"))

    (line,) = (line for line in markdown.splitlines() if line.startswith("Time per output token"))
    assert "1.55× to 1.55× (batch 1 to 16) as fast as torch.compile, static cache" in line
    assert line.endswith("as fast as upstream (no cache).")


def test_every_point_of_a_chart_stands_in_the_table_beneath_it(page, tmp_path) -> None:
    html, markdown = page(dynamic_lengths(tmp_path / "runs"))

    chart = curves(html)
    lines = re.findall(r"<tr><td><i class=\"(line-\d)\"></i>(.*?)</td>(.*?)</tr>", chart)
    assert len({css for css, _, _ in lines}) == 3  # a colour for each
    shown = {name: [float(each) for each in re.findall(r"<td>([\d.]+)", cells)] for _, name, cells in lines}
    assert shown["upstream"] == pytest.approx(list(TIMES["upstream"].values()), rel=0.01)
    assert "\n×: times as fast as torch.compile.\n" in markdown
    assert "| upstream | 1.50 (1.27×) | 3.10 (0.81×) | 20.5 (0.43×) | 260 (0.15×) | 990 (0.10×) |" in markdown
    points = re.findall(r'<g class="curve (line-\d)">(.*?)</g>', chart, re.S)
    for css, group in points:
        places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)%"', group)]
        assert len(places) == len(LENGTHS) and places == sorted(places)  # to the right with the length
        assert all(0 <= y <= 100 for _, y in places), css
        assert len(re.findall("<line ", group)) == len(LENGTHS) - 1


def test_a_length_that_one_way_could_not_do_leaves_a_gap_and_its_reason(page, tmp_path) -> None:
    folder = static_lengths(tmp_path / "runs")
    lost = json.loads((folder / "upstream_16384" / "report.json").read_text())
    lost |= {
        "status": "failed",
        "benchmark": None,
        "failure": {"stage": "build", "kind": "out_of_memory", "message": "!"},
    }
    (folder / "upstream_16384" / "report.json").write_text(json.dumps(lost))
    html, markdown = page(folder)

    assert "| 260 (0.15×) | – |" in markdown and "build: out_of_memory: !" in html
    assert "upstream, 16384 tokens: build: out_of_memory" in markdown


def test_device_memory_has_a_chart_where_each_size_was_a_run_of_its_own(page, tmp_path) -> None:
    folder = static_lengths(tmp_path / "static")
    for i, length in enumerate(LENGTHS):
        path = folder / f"upstream_{length}" / "report.json"
        report = json.loads(path.read_text())
        report["benchmark"]["memory"]["peak_bytes"] = (10 + i) * 10**9
        path.write_text(json.dumps(report))
    html, markdown = page(folder)

    _, _, cells = curves(html, "Device memory, by the prompt&#39;s length").partition("upstream</td>")
    assert re.findall(r"<td>([\d.]+)", cells)[:5] == ["10.0", "11.0", "12.0", "13.0", "14.0"]
    assert "| upstream | 10.0 | 11.0 | 12.0 | 13.0 | 14.0 |" in markdown

    html, _ = page(dynamic_lengths(tmp_path / "dynamic"))  # one run took it for all of its lengths
    assert "Device memory" not in html
    html, _ = page(batches(tmp_path / "batches"))  # four questions, the same runs
    assert html.count("<h3>Device memory, by batch</h3>") == 1
