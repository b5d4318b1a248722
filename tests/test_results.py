"""docs/results.md and the pictures are what the reports say, and can be read."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from reports import failed, generating, keep, real, timed

from benchmarks import before, profile_tables, results, speed_up, stacks
from benchmarks.generation_table import batch_table
from benchmarks.pictures import FILLS, colours, svg
from benchmarks.prompt_table import length_table, prompt_tables
from benchmarks.ways import Row, rows
from pipeline.compare.charts import Bar, Chart, Segment
from pipeline.compare.sources import Found
from pipeline.record.report import upgraded

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return results.files()


def test_the_page_the_pictures_and_the_readme_are_what_the_command_makes(made: dict[Path, str]) -> None:
    """``python -m benchmarks.results`` writes them."""
    assert {"results.md", "speed-up.svg", "README.md"} <= {path.name for path in made}
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, path


def test_a_picture_that_nothing_makes_is_none_of_the_pages(made: dict[Path, str]) -> None:
    assert set(results.PICTURES.iterdir()) == {path for path in made if path.suffix == ".svg"}


def test_over_every_table_stand_the_card_the_versions_and_what_the_vendor_says(made: dict[Path, str]) -> None:
    lines = made[results.PAGE].splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(tables) > 10
    for i in tables:
        title = next(line for line in reversed(lines[: i - 1]) if line)
        assert re.search(r"NVIDIA \w+.*, TensorRT(-RTX)? [\d.]+, torch [\d.]+", title), title
        if "compute capability 9.0" in title:
            assert "(officially not supported by the vendor for TensorRT-RTX)" in title
        else:
            assert "compute capability" in title


def test_stacks_that_are_older_than_the_newest_are_called_so_and_hold_rows_of_their_own(made: dict[Path, str]) -> None:
    held = stacks.measured()
    found = [one.stack for one in held]
    heads = [line.removeprefix("## ") for line in made[results.PAGE].splitlines() if line.startswith("## ")]
    orders = [(one.is_of_this_code, one.stack.tensorrt, len(one.reports)) for one in held]
    assert orders == sorted(orders, reverse=True)
    assert heads[0] == found[0].title
    for head, stack in zip(heads, found, strict=True):
        assert head.startswith("Older stack: ") == (stack.tensorrt < found[0].tensorrt)
    for part in made[results.PAGE].split("\n## ")[1:]:
        assert len(set(re.findall(r"NVIDIA H\d+[^,]*, compute", part))) == 1


def test_a_folder_of_two_stacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy.deepcopy(real("llama3_1b-upstream"))
    other["environment"]["tensorrt"] = "1.6.1.120"
    keep(tmp_path / "mixed" / "one", real("llama3_1b-detect_causal"))
    keep(tmp_path / "mixed" / "two", other)
    monkeypatch.setattr(stacks, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"mixed: .*one stack"):
        stacks.measured()


def found(report: dict[str, Any], name: str = "one") -> Found:
    """``report`` as it is read from a file."""
    return Found(upgraded(copy.deepcopy(report)), name)


def rows_of(*reports: dict[str, Any]) -> list[Row]:
    return rows(found(report, str(i)) for i, report in enumerate(reports))


def races(*reports: dict[str, Any]) -> dict[tuple[str, str], float]:
    results_ = speed_up.results(rows_of(*reports))
    return {(each.rival, each.ours.way.strategy): each.faster.value for each in results_}


OWN, COMPILE = "Torch-TensorRT as it ships, one length", "torch.compile, compiled for the one length"


def test_a_speed_up_is_the_rivals_time_over_ours_and_needs_both() -> None:
    ours, own, compiled = (real(f"llama3_1b-{name}") for name in ("detect_causal", "upstream", "torch_compile"))
    once, twice = races(ours, own, compiled), races(ours, timed(own, 2), compiled)
    against_own, against_compile = (OWN, "detect_causal"), (COMPILE, "detect_causal")

    assert set(once) == {against_own, against_compile}
    medians = [report["benchmark"]["prefill"]["device_ms"]["median"] for report in (own, ours)]
    assert once[against_own] == pytest.approx(medians[0] / medians[1])
    assert twice[against_own] == pytest.approx(2 * once[against_own])
    assert twice[against_compile] == once[against_compile]
    wrong = failed(own, "verify", "accuracy", "wrong")
    assert set(races(ours, wrong, compiled)) == {against_compile}
    assert races(real("llama3_1b-mask_input"), own, compiled) == {}


def test_a_rival_runs_by_its_best_settings_and_ours_by_what_one_gets_without_asking() -> None:
    ours, compiled = real("llama3_1b-detect_causal"), real("llama3_1b-torch_compile")
    better, asked = timed(compiled, 0.5), timed(ours, 0.5)
    better["config"]["backend"]["attention"] = "flex_attention"
    asked["config"]["strategy"]["without"] = ["scale"]

    assert races(ours, compiled, better)[COMPILE, "detect_causal"] == races(ours, better)[COMPILE, "detect_causal"]
    assert races(ours, asked, compiled) == races(ours, compiled)


def test_rows_of_other_lengths_do_not_race() -> None:
    ours, own = real("llama3_1b-detect_causal"), real("llama3_1b-upstream")
    own["config"]["shape"] = {"kind": "dynamic", "batch": 1, "min": 2, "opt": 2048, "max": 2048, "exact": []}
    assert races(ours, own) == {}


def test_our_fastest_cache_races_what_one_would_use_instead() -> None:
    ours = real("llama3_1b-detect_causal")
    slow, fast = generating(ours, "static", 9.0, 3.0), generating(ours, "in_engine", 9.0, 1.0)
    own = generating(real("llama3_1b-upstream"), "none", 21.0, 21.0)
    (result,) = speed_up.results(rows_of(as_generation(slow), as_generation(fast), as_generation(own)))

    assert (result.ours.way.cache, result.rival) == ("in_engine", "Torch-TensorRT as it ships, no cache")
    assert result.faster.value == pytest.approx((21 * 128) / (9 + 127))


def as_generation(report: dict[str, Any]) -> dict[str, Any]:
    """:func:`reports.generating` of one sequence, with the setting that asks for it."""
    report["config"]["benchmark"]["generate"] = {"batch": 1, "input_length": 2048, "output_length": 128}
    return report


def test_reports_of_one_way_and_task_are_processes_of_one_row_and_its_time_their_median() -> None:
    report = real("llama3_1b-detect_causal")
    (row,) = rows_of(timed(report, 1.0), timed(report, 1.2), timed(report, 1.1), failed(report, "build", "crash", "x"))
    median, (low, high) = (report["benchmark"]["prefill"]["device_ms"][key] for key in ("median", "ci95"))

    assert row.time is not None and len(row.figures) == 3
    assert row.time.median == pytest.approx(1.1 * median)
    assert (row.time.low, row.time.high) == pytest.approx((low, 1.2 * high))
    assert "3 processes" in prompt_tables([row], CARD)
    other = copy.deepcopy(report)
    other["config"]["precision"] = "bf16"
    assert len(rows_of(report, other)) == 2


def test_a_prompt_in_chunks_is_no_repetition_of_one_in_a_single_pass() -> None:
    whole = real("llama3_1b-detect_causal")
    chunked = copy.deepcopy(whole)
    chunked["config"]["cache"] |= {"name": "in_engine", "chunk": 8192}
    rows = rows_of(whole, chunked)
    assert len(rows) == 2
    assert "length, cache in the engine, `cache.chunk=8192` |" in prompt_tables(rows, CARD)


CARD = real("llama3_1b-detect_causal")["environment"]


def at_length(name: str, length: int, factor: float) -> dict[str, Any]:
    """The report of an engine of ``length``, which took ``factor`` times as long."""
    report = timed(real(f"llama3_1b-{name}"), factor)
    report["benchmark"]["prefill"]["input_length"] = length
    report["config"]["shape"] |= {"min": length, "opt": length, "max": length}
    report["config"]["benchmark"]["shapes"] = [{"batch": 1, "input_length": length}]
    return report


def swept() -> list[dict[str, Any]]:
    made = [
        at_length(name, length, length / 2048)
        for length in (128, 2048, 16384)
        for name in ("detect_causal", "upstream", "torch_compile")
    ]
    made[-2] = failed(made[-2], "build", "out_of_memory", "needs 100 GB")
    return made


def test_what_a_prompt_takes_by_its_length_is_a_table_and_lines_with_a_failed_row_in_it() -> None:
    chosen = rows_of(*swept())
    text = length_table(chosen, CARD)
    lines = [line for line in text.splitlines() if re.match(r"\| \d", line)]

    assert [line.split(" | ")[0] for line in lines] == ["| 128", "| 2048", "| 16384"]
    assert "| – | – |" in lines[-1] and "`upstream`: out\\_memory" not in lines[0]
    assert "out_of_memory: needs 100 GB" in lines[-1].replace("\\", "")
    own, ours = (real(f"llama3_1b-{n}")["benchmark"]["prefill"]["device_ms"] for n in ("upstream", "detect_causal"))
    assert f"{own['median'] / ours['median']:.2f} (" in lines[0]
    assert prompt_tables(chosen, CARD) == "", "what the table by length shows is not shown again"

    picture = ET.fromstring(results.mask_picture(figures_of(chosen)) or "")
    curves = list(picture.iter(f"{SVG}polyline"))
    assert [len((curve.get("points") or "").split()) for curve in curves] == [3, 2, 3, 3, 2, 3]
    tops = [float(point.split(",")[1]) for point in (curves[0].get("points") or "").split()]
    assert tops == sorted(tops, reverse=True), "the longer the prompt, the higher its point"
    inside(picture)


def figures_of(chosen: list[Row]) -> results.Figures:
    one = stacks.Measured(stacks.stack_of(CARD), CARD, [each for row in chosen for each in row.found])
    return results.Figures(one, older=False)


def test_two_lengths_are_no_sweep_and_nothing_is_said_where_nothing_was_measured() -> None:
    two = rows_of(*(at_length("detect_causal", length, 1.0) for length in (128, 2048)))
    assert length_table(two, CARD) == "" and len(prompt_tables(two, CARD).split("**llama3_1b**")) == 3

    empty = figures_of([])
    assert all(make(empty) is None for make in results.MADE.values())
    shown = results.parts(empty, set())
    assert not any(
        shown[name] for name in ("generation", "batches", "lengths", "prompts", "step", "prompt", *results.RAW)
    )


def test_generations_of_several_sequences_stand_beside_those_of_one() -> None:
    made = []
    for batch in (1, 4):
        for name, cache, step in (("detect_causal", "in_engine", 1.0), ("torch_compile", "static", 1.5)):
            report = as_generation(generating(real(f"llama3_1b-{name}"), cache, 9.0, step * batch))
            report["config"]["benchmark"]["generate"]["batch"] = batch
            report["config"]["backend"]["mode"] = None if name == "detect_causal" else "reduce-overhead"
            report["benchmark"]["generate"]["batch"] = batch
            made.append(report)
    text = batch_table(rows_of(*made), CARD)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if re.match(r"\| \d", line)]

    assert [line[:2] for line in lines] == [
        [batch, way]
        for batch in "14"
        for way in ("`detect_causal`, cache in the engine", "torch.compile, static cache")
    ]
    assert lines[2][3] == f"{4 * 128 / (9 + 127 * 4) * 1e3:.0f}"
    assert float(lines[2][4].split()[0]) == pytest.approx((9 + 127 * 6) / (9 + 127 * 4), abs=0.01)
    assert batch_table(rows_of(*made[:2]), CARD) == ""


def of_this_code(report: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    changed["environment"]["code"] = stacks.this_code()
    return changed


def test_what_all_rows_carry_is_said_once_and_what_some_carry_in_the_row() -> None:
    ours, own = real("llama3_1b-detect_causal"), real("llama3_1b-upstream")
    every = prompt_tables(rows_of(ours, own), CARD)
    some = prompt_tables(rows_of(of_this_code(ours), own), CARD)
    none = prompt_tables(rows_of(of_this_code(ours), of_this_code(own)), CARD)

    assert "Every row was measured by older code than this." in every and "| older code |" not in every
    assert [line.endswith("| older code |") for line in some.splitlines() if line.startswith("| `")] == [False, True]
    assert "older code" not in none
    assert any("power" in taint for taint in ours["benchmark"]["prefill"]["tainted"])
    assert "power-limited" in some and "cap held clocks back" not in some
    limited = copy.deepcopy(own)
    limited["benchmark"]["prefill"]["tainted"] = ["clocks held back by the power limit for 3% of the measurement"]
    both = prompt_tables(rows_of(ours, limited), CARD)
    assert "The card's power cap held clocks back in every row." in both and "power-limited" not in both


def test_rows_that_an_older_stack_had_too_say_in_one_line_how_it_was() -> None:
    newer = copy.deepcopy(real("llama3_1b-detect_causal"))
    newer["environment"] |= {"tensorrt": "9.9.9.9", "torch": "9.9"}
    there, here = prompt_tables(rows_of(newer), newer["environment"]), prompt_tables(rows_of(newer), CARD)

    (line,) = [line for line in there.splitlines() if "then → now" in line]
    assert (
        line.startswith("TensorRT-RTX 1.4.0.76, torch 2.11.0, NVIDIA H200")
        and "`detect_causal`, one length 8.60 →" in line
    )
    assert "then → now" not in here, "the same stack is not older than itself"


def test_what_an_older_stack_took_is_in_reports_of_the_history() -> None:
    kept = [one for each in before.earlier().values() for one in each.values()]
    assert len(kept) > 50
    names = "".join(f"{one.commit}:{one.file}\n" for one in kept)
    done = subprocess.run(["git", "cat-file", "--batch"], cwd=stacks.ROOT, input=names.encode(), capture_output=True)
    if done.returncode or b" missing\n" in done.stdout:
        pytest.skip("a checkout without its history")
    data, start = done.stdout, 0
    for one in kept:
        end = data.index(b"\n", start)
        size = int(data[start:end].split()[2])
        content = data[end + 1 : end + 1 + size]
        start = end + 2 + size
        assert hashlib.sha256(content).hexdigest() == one.sha256, one.file
        (row,) = rows_of(json.loads(content))
        assert row.time is not None and (row.task, row.way, row.time.median) == (one.task, one.way, one.ms)


def inside(picture: ET.Element) -> None:
    """All text is inside of the picture."""
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    for each in picture.iter(f"{SVG}text"):
        letter = {"dim": 6.6, "title": 11, "head": 8}.get(each.get("class", ""), 7.4)  # pixels, of wide fonts
        x, long = float(each.get("x", 0)), letter * len(each.text or "")
        start = {None: x, "middle": x - long / 2, "end": x - long}[each.get("text-anchor")]
        assert start >= 0 and start + long <= width and float(each.get("y", 0)) < height, each.text


def test_the_widths_of_bars_are_their_values_and_all_text_is_inside_of_the_picture(made: dict[Path, str]) -> None:
    picture = ET.fromstring(made[results.PICTURES / "speed-up.svg"])
    values = [float((each.text or "")[:-1]) for each in picture.iter(f"{SVG}text") if each.get("class") == "value"]
    bars = [float(each.get("width", 0)) for each in picture.iter(f"{SVG}rect") if each.find(f"{SVG}title") is not None]

    assert len(bars) == len(values) > 3
    for bar, value in zip(bars, values, strict=True):
        assert bar / bars[0] == pytest.approx(value / values[0], rel=0.01)
    for path, text in made.items():
        if path.suffix == ".svg":
            inside(ET.fromstring(text))


def test_what_a_report_says_cannot_break_out_of_a_picture() -> None:
    bar = Bar('<b>&"', "</text>", [Segment(0, 50, "engine", "<script>")])
    picture = ET.fromstring(svg("a < b", ["&"], [Chart("<", "ms", "", [bar], [(0, "<0")])], {"engine": "<e>"}))
    assert '<b>&"' in [each.text for each in picture.iter(f"{SVG}text")]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_pictures_can_be_read_on_light_and_on_dark(scheme: int, made: dict[Path, str]) -> None:
    """WCAG 2.2, success criteria 1.4.3 (text: 4.5) and 1.4.11 (graphics: 3); the picture has a ground of its own."""
    colour = colours()[scheme]
    for text in ("ink", "dim"):
        assert contrast(colour[text], colour["card"]) >= 4.5, text
    for part in [*FILLS, "whisker", "floor"]:
        assert contrast(colour[part.removeprefix("stage-")], colour["card"]) >= 3, part
    for path in results.PICTURES.iterdir():
        light, dark = made[path].split("@media (prefers-color-scheme: dark)")
        assert f".ground {{ fill: {colour['card']};" in (light, dark)[scheme]


KEPT_PROFILES = Path(__file__).parent / "kept_profiles"


def test_every_kernel_of_a_profile_has_one_role_and_gate_and_up_are_the_longer_of_two() -> None:
    found = profile_tables.profiles(KEPT_PROFILES, "decode")
    assert len(found) == 2
    for profile in found.values():
        roles = profile_tables.by_role(profile["kernels"], profile_tables.STEP_ROLES)
        assert sum(role["us"] for role in roles.values()) == pytest.approx(profile["kernels_us"])
        assert sum(role["launches"] for role in roles.values()) == profile["launches"]
        assert all(role["launches"] for role in roles.values())
        layers = roles["scores"]["launches"]
        assert roles["gate and up projections, with the norm"]["launches"] == layers


def test_the_groups_of_a_step_are_its_roles_put_together_and_add_up_to_the_step() -> None:
    roles = {
        "products with the weights": ("gate", "query, key and value", "down", "the product", "output"),
        "attention and its cache": ("scores", "softmax", "weighted", "rotation"),
    }
    for profile in profile_tables.profiles(KEPT_PROFILES, "decode").values():
        groups = profile_tables.by_group(profile)
        by_role = profile_tables.by_role(profile["kernels"], profile_tables.STEP_ROLES)
        assert sum(groups.values()) == pytest.approx(profile["step_us"])
        for group, names in roles.items():
            those = sum(role["us"] for name, role in by_role.items() if name.startswith(names))
            assert groups[group] == pytest.approx(those, abs=by_role["everything else"]["us"])
        (bar,) = profile_tables.step_chart({"m": profile}).bars
        assert [segment.width / bar.segments[0].width for segment in bar.segments] == pytest.approx(
            [us / groups[profile_tables.GROUPS[0]] for us in groups.values()]
        )


def test_roles_that_no_kernel_has_and_variants_that_were_not_profiled_are_not_shown(tmp_path: Path) -> None:
    profile = json.loads((KEPT_PROFILES / "llama3_1b-decode.json").read_text())
    profile["kernels"] = [kernel for kernel in profile["kernels"] if "MaxrSubExp" not in kernel["name"]]
    (tmp_path / "llama3_1b-decode.json").write_text(json.dumps(profile))
    text = profile_tables.steps(tmp_path)
    assert "scores" in text and "softmax" not in text and "earlier step" not in text


def test_a_way_of_the_drop_in_that_failed_stays_in_its_table_with_the_reason(tmp_path: Path) -> None:
    environment = real("llama3_1b-upstream")["environment"]
    common = {"model": "m", "logits": "last", "length": 8, "own_relative_error": 0.01, "environment": environment}
    before = common | {"way": "before", "relative_error": 0.02, "device_ms": {"median": 4.0, "ci95": [3.9, 4.1]}}
    broken = common | {"way": "rewrite", "failure": "RuntimeError: a | b"}
    other = common | {
        "way": "register",
        "relative_error": 0.02,
        "first_ms": 9.0,
        "device_ms": {"median": 2.0, "ci95": [2, 2]},
    }
    path = tmp_path / "drop_in.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (before, other, broken)))
    text = profile_tables.drop_in(path)

    assert "logits of the last token" in text and stacks.caption(environment) in text
    assert "| – | – | RuntimeError: a \\| b | – |" in text
    assert re.search(r"\| 2\.000 \(2\.000–2\.000\) \| 2\.00 \(.*\| 0\.020 \| 9\.0 \|", text)


def test_kernels_that_no_role_knows_are_shown_by_their_names(tmp_path: Path) -> None:
    profile = json.loads((KEPT_PROFILES / "llama3_1b-decode.json").read_text())
    longest = profile["kernels"][0]
    longest["name"] = "__myl_NewAndUnheardOf_0x1234"
    (tmp_path / "llama3_1b-decode.json").write_text(json.dumps(profile))
    text = profile_tables.steps(tmp_path)
    assert f"| `NewAndUnheardOf` | {longest['us']:.1f} ({longest['launches']}) |" in text
    named = sum(float(us) for us in re.findall(r"^\| (?:`.*`|everything else) \| ([\d.]+) \(", text, re.MULTILINE))
    assert named == pytest.approx(profile["kernels_us"], rel=0.001) and "gate and up" not in text


def test_layers_without_a_fused_kernel_are_remarked() -> None:
    report = of_this_code(real("llama3_1b-detect_causal"))
    report["engine"]["unfused"] = []
    assert "without a fused kernel" not in prompt_tables(rows_of(report), CARD)
    report["engine"]["unfused"] = [{"layers": ["a", "b"], "form": "x", "reason": "y"}, {"layers": ["c"]}]
    assert "3 attention layers without a fused kernel" in prompt_tables(rows_of(report), CARD)
