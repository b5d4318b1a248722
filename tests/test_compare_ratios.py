"""The comparison of reports: how many times as fast, than what, and when a row is slower than before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reports import REAL, failed, generating, keep, real, timed

from pipeline.compare import ratios
from pipeline.compare.ratios import ratio
from pipeline.compare.rows import Figure, row
from pipeline.compare.sources import read_file

# ---- ratios and baselines


def test_a_ratio_is_that_of_the_medians_and_its_interval_holds_it():
    slow, fast = Figure(20.0, 19.8, 20.2), Figure(10.0, 9.95, 10.05)

    times = ratio([slow], [fast])

    assert times.value == 2.0 and 1.97 < times.low < 2.0 < times.high < 2.03
    assert times.inverse.value == 0.5 and times.inverse.low < 0.5 < times.inverse.high


def test_an_interval_from_samples_is_that_of_their_bootstrap():
    even = Figure(10.0, 0.1, 100.0, samples=(10.0,) * 50)  # the summary lies; the samples know better

    assert ratio([even], [even]) == ratios.Ratio(1.0, 1.0, 1.0)


def test_repetitions_that_disagree_widen_the_interval():
    one = Figure(10.0, 9.99, 10.01)
    apart = [Figure(9.0, 8.99, 9.01), Figure(11.0, 10.99, 11.01)]

    alone, together = ratio([one], [one]), ratio(apart, [one])

    assert together.value == pytest.approx(1.0)
    assert together.high - together.low > 10 * (alone.high - alone.low)


def test_samples_beside_a_report_are_read(tmp_path):
    folder = keep(tmp_path / "run", real("llama3_1b-lowering"), {"prefill": {"device_ms": [9.0, 9.1, 9.2]}})

    (timing,) = row(read_file(folder / "report.json")).timings.values()

    assert timing.time.samples == (9.0, 9.1, 9.2)


def test_a_baseline_of_another_precision_gives_no_speed_up(compare, tmp_path):
    bf16 = real("llama3_1b-upstream")
    bf16["config"]["precision"] = "bf16"
    keep(tmp_path / "runs" / "fp16", real("llama3_1b-lowering"))
    keep(tmp_path / "runs" / "bf16", bf16)

    _, _, other_precision, _ = compare(tmp_path / "runs", "--baseline", "strategy:upstream")
    _, _, asked_for, _ = compare(tmp_path / "runs", "--baseline", "strategy:upstream,precision:bf16")

    assert "as fast as upstream" not in other_precision and "no baseline of the same precision" in other_precision
    assert re.search(r"\*\*lowering\*\*: .*2\.28× \(2\.2\d–2\.\d\d\) as fast as upstream", asked_for)


def caches(folder: Path) -> Path:
    """Generations: ours with two caches and without, PyTorch's with two and without, and upstream's without."""
    for name, cache, ttft, tpot in (
        ("detect_causal", "in_engine", 9.0, 1.2), ("detect_causal", "static", 9.1, 2.2),
        ("detect_causal", "none", 11.0, 11.0), ("eager", "static", 13.0, 12.0), ("eager", "dynamic", 14.0, 14.0),
        ("eager", "none", 12.9, 13.0), ("upstream", "none", 21.0, 21.0),
    ):  # fmt: skip
        keep(folder / f"{name}_{cache}", generating(real(f"llama3_1b-{name}"), cache, ttft, tpot))
    return folder


def test_a_winner_with_another_cache_than_the_baselines_still_shows_its_speed_up_and_over_what(compare, tmp_path):
    _, html, markdown, _ = compare(caches(tmp_path / "runs"), "--baseline", "strategy:upstream")

    expected = (21.0 + 127 * 21.0) / (9.0 + 127 * 1.2)
    assert re.search(rf"Generation, .*: \*\*detect_causal, cache in the engine\*\*: 161 ms; {expected:.2f}× "
                     r"\([\d.–]+\) as fast as upstream \(no cache\)", markdown)  # fmt: skip
    assert f"{expected:.2f}×" in html


def test_a_baseline_does_the_same_work_where_there_is_one_and_ratios_over_several_name_theirs(compare, tmp_path):
    _, html, _, _ = compare(caches(tmp_path / "runs"), "--baseline", "backend:eager")

    chart = next(c for c in re.findall(r'<figure class="time".*?</figure>', html, re.S) if "Generation" in c)
    rows = dict(re.findall(r'data-row="([^"]*)".*?<span class="ratio">(.*?)</span>', chart, re.S))
    assert rows["detect_causal, static cache"].endswith("× PyTorch eager, static cache")
    assert rows["detect_causal"].endswith("× PyTorch eager")  # both without a cache
    # None of PyTorch's has this cache: the fastest of them, by its name.
    assert rows["detect_causal, cache in the engine"].endswith("× PyTorch eager, static cache")
    assert {name for name, ratio in rows.items() if ratio == "baseline"} == {
        "PyTorch eager", "PyTorch eager, static cache", "PyTorch eager, dynamic cache"
    }  # fmt: skip
    assert "a row that names no cache has none" in html and "×: times as fast as the row named beside it" in chart


def test_without_a_baseline_rows_are_compared_with_the_fastest_rival_and_with_upstream(compare, tmp_path):
    _, html, markdown, _ = compare(caches(tmp_path / "runs"))

    chart = next(c for c in re.findall(r'<figure class="time".*?</figure>', html, re.S) if "Generation" in c)
    assert "×: times as fast as PyTorch eager, static cache" in chart and "× as fast as PyTorch" not in re.sub(
        r'<p class="verdict.*?</p>|<title>.*?</title>|aria-label=".*?"', "", chart, flags=re.S)  # fmt: skip
    assert re.search(r"cache in the engine\*\*: 161 ms; 9\.5\d× .*as fast as PyTorch eager, static cache; 16\.6\d× "
                     r"\([\d.–]+\) as fast as upstream \(no cache\)", markdown)  # fmt: skip


def test_one_baseline_is_named_once_with_its_cache_where_rows_have_others(compare, tmp_path):
    _, html, markdown, _ = compare(caches(tmp_path / "runs"), "--baseline", "strategy:upstream")

    chart = next(c for c in re.findall(r'<figure class="time".*?</figure>', html, re.S) if "Generation" in c)
    assert "×: times as fast as upstream (no cache)</small>" in chart
    assert all(re.fullmatch(r"[\d.]+×|baseline", each) for each in re.findall(r'class="ratio">(.*?)</span>', chart))
    assert "| times as fast as upstream (no cache) |" in markdown


def test_rows_are_held_only_to_a_baseline_that_does_the_same_work(compare, tmp_path):
    """A cached baseline makes no row without a cache a regression."""
    code, _, _, said = compare(
        caches(tmp_path / "runs"), "--baseline", "strategy:detect_causal,cache:static", "--fail-if-slower", "5%"
    )
    assert code == 1 and "eager" in said

    only = tmp_path / "only"
    keep(only / "ours", generating(real("llama3_1b-detect_causal"), "static", 9.1, 2.2))
    keep(only / "theirs", generating(real("llama3_1b-eager"), "none", 12.9, 13.0))
    code, html, _, said = compare(only, "--baseline", "strategy:detect_causal", "--fail-if-slower", "5%")
    assert (code, said) == (0, "")
    assert f"{(9.1 + 127 * 2.2) / (12.9 + 127 * 13.0):.2f}×" in html  # shown all the same


def test_repetitions_are_one_row_at_the_mean_of_their_medians_with_an_interval_that_holds_their_differences(
    compare, tmp_path
):
    medians = []
    for i, factor in enumerate((0.98, 1.0, 1.03)):
        report = timed(real("llama3_1b-lowering"), factor)
        medians.append(report["benchmark"]["prefill"]["device_ms"]["median"])
        keep(tmp_path / "runs" / str(i), report)
    keep(tmp_path / "runs" / "upstream", real("llama3_1b-upstream"))
    lost = failed(real("llama3_1b-lowering"), "build", "crash", "killed by signal 11")
    keep(tmp_path / "runs" / "lost", lost)
    other = real("llama3_1b-lowering")
    other["environment"]["torch"] = "9.9"
    keep(tmp_path / "runs" / "other", other)
    _, html, markdown, _ = compare(tmp_path / "runs")

    assert "Comparison of 6 runs" in html and "5 timed, 1 not" in html and "killed by signal 11" in html
    (chart,) = re.findall(r'<figure class="time".*?</figure>', html, re.S)
    rows = {name.partition("\N{NO-BREAK SPACE}")[0] for name in re.findall(r'data-row="([^"]*)"', chart)}
    assert rows == {"lowering, torch 2.11.0", "lowering, torch 9.9", "upstream"}
    (line,) = (line for line in markdown.splitlines() if line.startswith("| lowering") and "3 runs" in line)
    found = re.search(r"\| ([\d.]+) \(([\d.]+)–([\d.]+)\) \|", line)
    assert found is not None
    centre, low, high = map(float, found.groups())
    assert centre == pytest.approx(sum(medians) / 3, rel=0.001)
    assert min(medians) * 0.99 < low < medians[1] * 0.995 and medians[1] * 1.005 < high < max(medians) * 1.01


# ---- the regression check


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    for name in ("upstream", "mask_input", "eager"):
        keep(tmp_path / "earlier" / name, real(f"llama3_1b-{name}"))
    return tmp_path / "earlier"


@pytest.mark.parametrize(("factor", "code", "verdict"), [
    (1.10, 1, "slower"), (1.03, 0, "slower, within the limit"), (1.0, 0, "no difference"), (0.9, 0, "faster")
])  # fmt: skip
def test_a_row_is_slower_when_its_whole_interval_is(compare, earlier, tmp_path, factor, code, verdict):
    keep(tmp_path / "now" / "upstream", timed(real("llama3_1b-upstream"), factor))

    got, _, markdown, said = compare(tmp_path / "now", "--against", earlier, "--fail-if-slower", "5%")

    assert got == code
    assert f"| {verdict} |" in markdown and markdown.count("was not run again") == 2
    assert ("slower: llama3_1b (random weights), upstream" in said) == bool(code)


def test_noise_is_no_regression(compare, earlier, tmp_path):
    noisy = timed(real("llama3_1b-upstream"), 1.10)
    median = noisy["benchmark"]["prefill"]["device_ms"]["median"]
    noisy["benchmark"]["prefill"]["device_ms"]["ci95"] = [0.8 * median, 1.2 * median]
    keep(tmp_path / "now" / "upstream", noisy)

    code, _, markdown, _ = compare(tmp_path / "now", "--against", earlier, "--fail-if-slower", "5%")

    assert code == 0 and "| no difference |" in markdown
    assert "Some or all of it measured on a GPU that the vendor does not support" in markdown


def test_a_row_that_now_fails_is_a_regression(compare, earlier, tmp_path):
    keep(tmp_path / "now" / "upstream", failed(real("llama3_1b-upstream"), "build", "crash", "killed by signal 11"))
    keep(tmp_path / "now" / "eager", real("llama3_1b-eager"))

    code, _, markdown, said = compare(tmp_path / "now", "--against", earlier, "--fail-if-slower", "5%")

    assert code == 1 and "failed: build: crash: killed by signal 11" in said and "no difference" in markdown


def test_rows_are_matched_by_their_settings_though_one_set_knows_fewer(compare, earlier, tmp_path):
    newer = timed(real("llama3_1b-upstream"), 1.2)
    newer["config"]["backend"]["brand_new"] = "setting"
    keep(tmp_path / "now" / "upstream", newer)

    code, _, _, said = compare(tmp_path / "now", "--against", earlier, "--fail-if-slower", "5%")

    assert code == 1 and "upstream" in said


def test_without_earlier_reports_rows_are_held_to_the_baseline(compare):
    code, _, _, said = compare(REAL, "--baseline", "strategy:upstream", "--fail-if-slower", "5%")

    assert code == 1  # torch_compile is, with qwen2_5_0_5b
    assert said.splitlines() == [
        line for line in said.splitlines() if "qwen2_5_0_5b" in line and "torch.compile" in line
    ]
