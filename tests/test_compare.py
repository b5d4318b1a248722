"""The comparison of reports: what it shows, and what speaks against a time."""

from __future__ import annotations

import copy
import re
from pathlib import Path

from reports import REAL, failed, generating, keep, only_section, real, rows_of, varied

from pipeline.compare.labels import sections
from pipeline.compare.rows import axes

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
