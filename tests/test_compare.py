"""The comparison of reports: what it shows, what it refuses, and when it calls a row slower."""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from reports import REAL, failed, generating, keep, real, timed, varied

from pipeline.compare import ratios
from pipeline.compare.__main__ import main
from pipeline.compare.labels import Section, sections
from pipeline.compare.ratios import ratio
from pipeline.compare.rows import Figure, Row, axes, row
from pipeline.compare.sources import Found, read_file
from pipeline.record.report import is_sealed, upgraded, write_report


def rows_of(*reports: dict) -> list[Row]:
    return [row(Found(upgraded(report), f"report {i}")) for i, report in enumerate(reports)]


def only_section(*reports: dict) -> Section:
    (section,) = sections(rows_of(*reports))
    return section


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command and returns its exit code, what it wrote (HTML and Markdown) and what it said to stderr."""

    def run(*arguments: object) -> tuple[int, str, str, str]:
        out = tmp_path / "page"
        code = main([*map(str, arguments), "-o", str(out)])
        texts = [(out / name).read_text() if out.exists() else "" for name in ("comparison.html", "comparison.md")]
        shutil.rmtree(out, ignore_errors=True)
        return code, *texts, capsys.readouterr().err

    return run


# ---- what is shown


def test_every_report_has_a_line_with_its_time_or_its_reason(compare, tmp_path):
    code, html, markdown, _ = compare(varied(tmp_path / "runs"))

    assert code == 0
    assert "Comparison of 21 runs" in html and "18 timed, 3 not" in html
    for text in (html, markdown):
        assert "9.14 (9.12–9.17)" in text  # llama3_1b, lowering
        assert "out_of_memory: needs 141.2 GiB" in text
        assert "TensorRT-RTX has no plugins" in text
        assert "no GPU could run it: nothing was timed" in text
        assert "Generation, 2048 tokens in, 128 out" in text and "Time per output token, 2048 tokens in" in text


def test_the_page_needs_nothing_from_anywhere_and_escapes_what_reports_say(compare, tmp_path):
    _, html, markdown, _ = compare(varied(tmp_path / "runs"))

    assert not re.search(r"(src|href)=\"?(https?:)?//|@import|url\(|fetch\(|XMLHttp|<script [^>]*src|import\(", html)
    assert "free &lt;b&gt;&amp;&#34;quoted&#34; | piped" in html and "<b>&" not in html
    assert 'free &lt;b&gt;&amp;"quoted" \\| piped' in markdown


def test_figures_of_an_unsupported_gpu_say_so_beside_every_table(compare):
    _, html, markdown, _ = compare(REAL)

    assert (
        html.count("Measured on a GPU that the vendor does not support") == html.count('class="figures sortable"') == 4
    )
    assert markdown.count("does not support this GPU") == 4


def test_a_supported_gpu_is_not_accused(compare, tmp_path):
    report = real("llama3_1b-lowering")
    report["environment"]["supported_by_vendor"] = True
    _, html, markdown, _ = compare(keep(tmp_path / "run", report))

    assert "does not support" not in html + markdown


def test_times_of_an_engine_that_was_not_verified_are_not_shown():
    unverified = real("llama3_1b-lowering")
    unverified["verify"]["passed"] = False

    (shown,) = rows_of(unverified)

    assert shown.timings == {} and shown.reason and "no verification" in shown.reason


def test_a_worst_case_without_a_finite_answer_is_shown_as_such(compare, tmp_path):
    report = failed(real("llama3_1b-lowering"), "verify", "accuracy", "no finite logits")
    report["verify"] = real("llama3_1b-lowering")["verify"] | {"passed": False}
    report["verify"]["cases"][0] |= {"relative_error": None, "passed": False}
    code, html, markdown, _ = compare(keep(tmp_path / "run", report))

    assert code == 0 and "not finite" in html and "– / 0.052 FAILED" in markdown


def test_labels_say_what_differs_and_no_more():
    fp16, bf16 = real("llama3_1b-lowering"), real("llama3_1b-lowering")
    bf16["config"]["precision"] = "bf16"
    level = copy.deepcopy(fp16)
    level["config"]["backend"]["optimization_level"] = 5
    dynamic = copy.deepcopy(fp16)
    dynamic["config"]["shape"] = {"kind": "dynamic", "batch": 1, "min": 2, "opt": 2048, "max": 2048}
    longer = copy.deepcopy(dynamic)
    longer["config"]["shape"]["max"] = 4096
    elsewhere = copy.deepcopy(fp16)
    elsewhere["environment"]["git"] = "0123456789abcdef0123456789abcdef01234567-dirty"

    def labels(*reports: dict) -> list[str]:
        return sorted(each.label for each in only_section(*reports).rows)

    assert labels(fp16, real("llama3_1b-eager"), real("llama3_1b-torch_compile")) == [
        "PyTorch eager", "lowering", "torch.compile"
    ]  # fmt: skip
    assert labels(fp16, bf16) == ["lowering, bf16", "lowering, fp16"]
    assert labels(fp16, level) == ["lowering, optimization level 5", "lowering, optimization level not set"]
    assert labels(fp16, dynamic, longer) == [
        "lowering, any length, up to 2048 tokens", "lowering, any length, up to 4096 tokens", "lowering, one length"
    ]  # fmt: skip
    assert labels(fp16, elsewhere)[0] == "lowering, git 0123456 with changes"
    assert labels(fp16, fp16) == ["lowering, run 1", "lowering, run 2"]


def test_a_cache_is_named_wherever_rows_have_several_kinds_and_none_needs_no_word():
    rows = only_section(
        generating(real("llama3_1b-detect_causal"), "in_engine", 9.0, 1.2),
        generating(real("llama3_1b-torch_compile"), "static", 10.0, 1.7),
        generating(real("llama3_1b-upstream"), "none", 21.0, 21.0),
    ).rows

    assert [each.label for each in rows] == [
        "detect_causal, cache in the engine", "torch.compile, static cache", "upstream"
    ]  # fmt: skip


def test_what_all_rows_of_a_chart_share_is_said_once_in_its_title(compare, tmp_path):
    for name in ("lowering", "upstream"):
        keep(tmp_path / "runs" / name, real(f"llama3_1b-{name}"))
    _, html, _, _ = compare(tmp_path / "runs")

    (chart,) = re.findall(r'<figure class="time".*?</figure>', html, re.S)
    assert "A prompt of 2048 tokens" in chart and chart.count("fp16") == chart.count("one length") == 1
    assert set(re.findall(r'data-row="([^"]*)"', chart)) == {"lowering", "upstream"} and "input_ids" not in html


def test_a_strategy_has_no_part_in_a_rival():
    assert not any(key.startswith("strategy") for key in axes(real("llama3_1b-eager")["config"]))


def test_models_and_gpus_are_not_mixed():
    other = real("llama3_1b-lowering")
    other["environment"]["gpu"] = "NVIDIA A100"

    titles = [each.title for each in sections(rows_of(real("llama3_1b-lowering"), other, real("qwen3_0_6b-lowering")))]

    assert titles == [
        "llama3_1b (random weights) on NVIDIA A100",
        "llama3_1b (random weights) on NVIDIA H200",
        "qwen3_0_6b (random weights) on NVIDIA H200",
    ]


def test_the_winner_is_named_with_its_lead_and_a_close_second_is_no_loser(compare):
    _, html, markdown, _ = compare(REAL, "--baseline", "strategy:upstream")

    won = r"A prompt of 2048 tokens: \*\*detect_causal\*\*: 9\.11 ms; lowering too close to call; "
    assert re.search(won + r"2\.29× \(2\.2\d–2\.3\d\) as fast as upstream\.", markdown)
    assert html.index('id="answers"') < html.index("<nav") < html.index("<section")


def test_what_has_no_time_stands_below_the_charts_with_its_reason_once(compare, tmp_path):
    llama = real("llama3_1b-detect_causal")
    keep(tmp_path / "runs" / "good", llama)
    for precision in ("bf16", "fp32"):
        lost = failed(llama, "build", "out_of_memory", "needs 141.2 GiB")
        lost["config"]["precision"] = precision
        keep(tmp_path / "runs" / precision, lost)
    nowhere = failed(llama, "", "", "") | {"status": "unavailable", "failure": None, "unavailable": "no plugins here"}
    nowhere["environment"] = llama["environment"] | {"gpu": None}
    nowhere["config"]["backend"] = {"name": "plugin"}
    keep(tmp_path / "runs" / "plugin", nowhere)
    _, html, _, _ = compare(tmp_path / "runs")

    below = html.index("Without a time")
    assert html.rindex("<figure") < below < html.index("out_of_memory: needs 141.2 GiB")
    assert (
        html.count("out_of_memory: needs 141.2 GiB")
        == html.count("no plugins here")
        == html.count("<h2>llama3_1b")
        == 1
    )
    assert "detect_causal, bf16; detect_causal, fp32" in html


# ---- what speaks against a time: words, and signs only where rows differ by them

POWER = ["clocks held back by software power cap before the measurement",
         "clocks held back by the power limit for 97% of the measurement"]  # fmt: skip
DRIFT = "device_ms drifted between the halves of the measurement"


def with_taints(folder: Path, **taints: list[str]) -> Path:
    for name, texts in taints.items():
        report = real(f"llama3_1b-{name}")
        report["benchmark"]["prefill"]["tainted"] = texts
        keep(folder / name, report)
    return folder


def signs(html: str) -> list[str]:
    return re.findall(r'data-row="([^"]*)\N{NO-BREAK SPACE}⚠"', html)


def test_a_power_limit_alone_is_a_remark_and_no_warning(compare, tmp_path):
    _, html, markdown, _ = compare(with_taints(tmp_path / "runs", lowering=POWER, upstream=[]))

    assert "⚠" not in html
    for text in (html, markdown):
        assert "power-limited 97 %" in text and text.count("The card's power limit held its clocks back".replace(
            "'", "&#39;") if text is html else "The card's power limit held its clocks back") == 1  # fmt: skip


def test_a_warning_stands_at_the_rows_that_it_is_of_and_one_that_all_have_is_said_once_above_them(compare, tmp_path):
    _, some, _, _ = compare(with_taints(tmp_path / "some", lowering=[DRIFT], upstream=POWER))
    _, every, _, _ = compare(with_taints(tmp_path / "all", lowering=[DRIFT], upstream=[DRIFT, *POWER]))

    assert signs(some) == ["lowering"] and "All rows:" not in some
    assert signs(every) == [] and every.count("All rows: drifted.") == 1


def test_remarks_are_words_and_the_end_of_the_page_explains_each(compare, tmp_path):
    strange = "the fan was louder than it should be, and somebody had opened the window of the room: see the log"
    others = ["host_ms drifted between the halves of the measurement", "2 other processes on the GPU"]
    folder = with_taints(tmp_path / "runs", lowering=[DRIFT, *POWER, *others], upstream=[])
    noted = real("llama3_1b-decompose")
    noted["notes"] = [strange, "backend=eager runs the model as it is: strategy has no part in this run"]
    keep(folder / "decompose", noted)
    _, html, markdown, _ = compare(folder)

    cells = re.findall(r'<td class="remark">(.*?)</td>', html)
    assert "drifted, power-limited 97 %, host drifted, shared card" in cells and not any(map(str.isdigit, cells))
    end = html[html.index('<section id="remarks">') :]
    for word in ("drifted", "power-limited", "host drifted", "shared card"):
        assert f"<dt>{word}" in end and f"- {word}: " in markdown
    assert strange in end and "has no part in this run" not in html


def test_revisions_are_seven_characters_and_stand_once(compare, tmp_path):
    folder = tmp_path / "runs"
    for name, revision in (("lowering", "a" * 40), ("upstream", "b" * 40), ("decompose", "b" * 40 + "-dirty")):
        report = real(f"llama3_1b-{name}")
        report["environment"]["git"] = revision
        keep(folder / name, report)
    _, html, markdown, _ = compare(folder)

    for text in (html, markdown):
        assert not re.search(r"[0-9a-f]{8,}-dirty|a{8}|b{8}", text)
        assert text.count("aaaaaaa") == text.count("bbbbbbb") == 1 and "bbbbbbb with changes" in text


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


PAGE = "#/experiments/1/runs/abc?workflowType=machine_learning"


def tracked(folder: Path, **stores: str) -> Path:
    for name, uri in stores.items():
        mlflow = {"uri": uri, "experiment_id": "1", "run_id": "abc"}
        keep(folder / name, real(f"llama3_1b-{name}") | {"mlflow": mlflow})
    return folder


def test_a_report_links_to_its_mlflow_run(compare, tmp_path):
    runs = tracked(tmp_path / "runs", lowering="sqlite:////data/mlflow.db", eager="https://me:secret@host:5/")
    _, html, markdown, _ = compare(runs, "--mlflow-ui", "http://elsewhere:1")

    for text in (html, markdown):
        assert f"http://elsewhere:1/{PAGE}" in text and f"https://me:***@host:5/{PAGE}" in text and "secret" not in text


def test_a_kept_report_links_to_no_store_of_the_machine_that_made_it(compare, tmp_path):
    stores = ("sqlite:////data/mlflow.db", "http://localhost:5000", "http://127.0.0.1:5000", "http://[::1]:5000",
              "http://0.0.0.0:5000", "file:///data/mlruns", "https://host:5")  # fmt: skip
    names = ("lowering", "eager", "upstream", "decompose", "mask_input", "detect_causal", "torch_compile")
    _, html, markdown, _ = compare(tracked(tmp_path / "runs", **dict(zip(names, stores, strict=True))))

    assert set(re.findall(r'href="(http[^"]*)"', html)) == {f"https://host:5/{PAGE}"}
    assert re.findall(r"\]\((http[^)]*)\)", markdown) == [f"https://host:5/{PAGE}"]


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
