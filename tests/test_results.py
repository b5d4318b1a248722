"""docs/results.md and the pictures are what the reports say, and can be read."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from reports import failed, keep, real, timed

from benchmarks import profile_tables, results, speed_up, stacks
from benchmarks.pictures import FILLS, colours, svg
from pipeline.compare.charts import Bar, Chart, Segment
from pipeline.compare.labels import sections
from pipeline.compare.rows import row
from pipeline.compare.sources import read

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return results.files()


def test_the_page_the_pictures_and_the_readme_are_what_the_command_makes(made: dict[Path, str]) -> None:
    """``python -m benchmarks.results`` writes them."""
    assert {path.name for path in made} == {"results.md", "speed-up.svg", "generation.svg", "README.md"}
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, path


def test_a_picture_that_nothing_makes_is_none_of_the_pages(made: dict[Path, str]) -> None:
    assert set(results.PICTURES.iterdir()) == {path for path in made if path.suffix == ".svg"}


def test_over_every_table_stand_the_card_the_versions_and_what_the_vendor_says(made: dict[Path, str]) -> None:
    lines = made[results.PAGE].splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(tables) > 15
    for i in tables:
        title = next(line for line in reversed(lines[: i - 1]) if line)
        assert re.search(r"NVIDIA \w+.*, TensorRT(-RTX)? [\d.]+, torch [\d.]+", title), title
        if "compute capability 9.0" in title:
            assert "(officially not supported by the vendor for TensorRT-RTX)" in title
        else:
            assert "compute capability" in title


def test_stacks_that_are_older_than_the_newest_are_called_so_and_hold_rows_of_their_own(made: dict[Path, str]) -> None:
    found = [one.stack for one in stacks.measured()]
    heads = [line.removeprefix("## ") for line in made[results.PAGE].splitlines() if line.startswith("## ")]
    assert found == sorted(found, reverse=True)
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


def races(folder: Path, *reports: dict[str, Any]) -> dict[tuple[str, str], float]:
    for i, report in enumerate(reports):
        keep(folder / str(i), report)
    found, unreadable = read([str(folder)], "", row)
    assert not unreadable
    return {(each.rival, each.ours.how): each.faster.value for each in speed_up.results(sections(found), "prefill")}


def test_a_speed_up_is_the_rivals_time_over_ours_and_needs_both(tmp_path: Path) -> None:
    ours, own, compiled = (real(f"llama3_1b-{name}") for name in ("detect_causal", "upstream", "torch_compile"))
    once, twice = (
        races(tmp_path / "once", ours, own, compiled),
        races(tmp_path / "twice", ours, timed(own, 2), compiled),
    )
    against_own, against_compile = (speed_up.OWN, "detect_causal"), (speed_up.COMPILE, "detect_causal")

    assert set(once) == {against_own, against_compile}
    medians = [report["benchmark"]["prefill"]["device_ms"]["median"] for report in (own, ours)]
    assert once[against_own] == pytest.approx(medians[0] / medians[1])
    assert twice[against_own] == pytest.approx(2 * once[against_own])
    assert twice[against_compile] == once[against_compile]
    wrong = failed(own, "verify", "accuracy", "wrong")
    assert set(races(tmp_path / "failed", ours, wrong, compiled)) == {against_compile}
    assert races(tmp_path / "masked", real("llama3_1b-mask_input"), own, compiled) == {}


def test_rows_of_other_lengths_do_not_race(tmp_path: Path) -> None:
    ours, own = real("llama3_1b-detect_causal"), real("llama3_1b-upstream")
    own["config"]["shape"] = {"kind": "dynamic", "batch": 1, "min": 2, "opt": 2048, "max": 2048, "exact": []}
    assert races(tmp_path, ours, own) == {}


def test_the_widths_of_bars_are_their_values_and_all_text_is_inside_of_the_picture(made: dict[Path, str]) -> None:
    picture = ET.fromstring(made[results.PICTURES / "speed-up.svg"])
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    texts = list(picture.iter(f"{SVG}text"))
    values = [float((each.text or "")[:-1]) for each in texts if each.get("class") == "value"]
    bars = [float(each.get("width", 0)) for each in picture.iter(f"{SVG}rect") if each.find(f"{SVG}title") is not None]

    assert len(bars) == len(values) > 5
    for bar, value in zip(bars, values, strict=True):
        assert bar / bars[0] == pytest.approx(value / values[0], rel=0.01)
    for each in texts:
        letter = {"dim": 6.6, "title": 11, "head": 8}.get(each.get("class", ""), 7.4)  # pixels, of wide fonts
        x, long = float(each.get("x", 0)), letter * len(each.text or "")
        start = {None: x, "middle": x - long / 2, "end": x - long}[each.get("text-anchor")]
        assert start >= 0 and start + long <= width and float(each.get("y", 0)) < height, each.text


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


def test_every_kernel_of_a_profile_has_one_role_and_gate_and_up_are_the_longer_of_two() -> None:
    for path in (stacks.PROFILES / "h200_rtx_1_4").glob("*-decode.json"):
        profile = json.loads(path.read_text())
        roles = profile_tables.by_role(profile["kernels"], profile_tables.STEP_ROLES)
        assert sum(role["us"] for role in roles.values()) == pytest.approx(profile["kernels_us"])
        assert sum(role["launches"] for role in roles.values()) == profile["launches"]
        assert all(role["launches"] for role in roles.values())
        layers = roles["scores"]["launches"]
        assert roles["gate and up projections, with the norm"]["launches"] == layers


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
