"""The page as a person sees it, in a real browser; screenshots are kept in ``test-artifacts``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import chromium, errors, look, shoot
from reports import ROOT, varied
from swept_reports import static_lengths

from pipeline.compare.__main__ import main

OVERFLOW = """ // of the page; what is wider than a box that scrolls does so within it
return [...document.querySelectorAll("figure *, h1, h2, p, li, dd, td, th")]
  .filter(e => !e.closest("svg, .scroll") && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page that has every kind of row."""
    folder = tmp_path_factory.mktemp("compared")
    assert main([str(varied(folder / "runs")), "--baseline", "strategy:upstream", "-o", str(folder)]) == 0
    return (folder / "comparison.html").as_uri()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the page of this repository's own results."""
    folder = tmp_path_factory.mktemp("own")
    assert main([str(ROOT / "benchmarks" / "results"), "-o", str(folder)]) == 0
    return (folder / "comparison.html").as_uri()


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def test_every_timed_row_has_a_bar_as_long_as_its_time(browser, page):
    look(browser, 1280)
    browser.get(page)

    prefill = next(f for f in browser.find_elements("css selector", "figure.time") if f.text.startswith("A prompt of"))
    bars = prefill.find_elements("css selector", ".bar:not(.ticks)")
    widths = [bar.find_element("css selector", "rect").size["width"] for bar in bars]
    shown_ms = [float(bar.find_element("css selector", ".value").text.split()[0]) for bar in bars]

    assert len(bars) == 10 and shown_ms == sorted(shown_ms)
    scale = widths[0] / shown_ms[0]
    assert widths == pytest.approx([scale * ms for ms in shown_ms], rel=0.02)
    assert errors(browser) == []


def test_rows_without_a_time_are_shown_with_their_reasons_below_the_charts(browser, page):
    look(browser, 1280)
    browser.get(page)

    listed = texts(browser, ".without li")

    oom = 'out_of_memory: needs 141.2 GiB of device memory, 3.1 GiB are free <b>&"quoted" | piped'
    assert len(listed) == 3 and any(oom in text for text in listed)
    assert any("TensorRT-RTX has no plugins" in text for text in listed)
    assert any(text.startswith("not executed ") for text in listed)
    for part in browser.find_elements("css selector", "section:has(.without)"):
        lowest = max(each.rect["y"] + each.rect["height"] for each in part.find_elements("css selector", "figure"))
        assert part.find_element("css selector", ".without").rect["y"] >= lowest


def test_figures_of_an_unsupported_gpu_say_so(browser, page):
    look(browser, 1280)
    browser.get(page)

    captions = texts(browser, "table.figures caption")

    assert captions == ["Measured on a GPU that the vendor does not support."] * 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["page", "own"])
def test_nothing_is_cut_off_or_needs_sideways_scrolling(browser, request, which, width, scheme):
    look(browser, width, scheme)
    browser.get(request.getfixturevalue(which))
    shoot(browser, f"compare_{which}_{width}_{scheme}", tallest=10_000)

    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert browser.execute_script(OVERFLOW) == []
    assert errors(browser) == []


def test_the_first_screen_says_which_question_which_row_won_and_by_how_much_over_what(browser, own):
    look(browser, 1280)
    browser.get(own)

    question = browser.find_element("css selector", "#answers tbody")
    assert question.rect["y"] + question.rect["height"] < 900
    first = question.text.splitlines()
    assert re.match(r"\w+.*\d+ tokens", first[0])  # the question
    assert re.search(r" \d[\d.]* ms .*\d\.\d\d× .*\w", " ".join(first[1:]))  # the time, and how many times what


def test_a_page_of_many_reports_is_read_in_a_few_screens_and_has_a_list_of_contents(browser, own):
    look(browser, 1280)
    browser.get(own)

    models = len(browser.find_elements("css selector", "section h2")) - 1
    assert browser.execute_script("return document.documentElement.scrollHeight") < 1500 + 2300 * models
    hrefs = browser.execute_script("return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash)")
    assert len(hrefs) > 10
    assert all(browser.execute_script("return !!document.getElementById(arguments[0])", each[1:]) for each in hrefs)


@pytest.mark.parametrize("which", ["page", "own"])
def test_a_verdict_beside_a_chart_takes_two_lines_at_most(browser, request, which):
    look(browser, 1280)
    browser.get(request.getfixturevalue(which))

    lines = browser.execute_script("""
        return [...document.querySelectorAll("figure .verdict")].map(
          e => e.scrollHeight / parseFloat(getComputedStyle(e).lineHeight))""")
    assert lines and max(lines) < 2.5


def test_a_table_sorts_by_its_columns_numbers_as_numbers_and_rows_without_a_value_last(browser, page):
    look(browser, 1280)
    browser.get(page)
    head = browser.find_elements("css selector", "table.figures:first-of-type thead th")
    names = [each.text for each in head]
    time = next(i for i, name in enumerate(names) if name.startswith("prompt, ms"))
    whole = next(i for i, name in enumerate(names) if name.startswith("generation, ms"))
    rows = len(browser.find_elements("css selector", "table.figures tbody tr"))

    def values(at: int) -> list[float | None]:
        first = browser.find_element("css selector", "table.figures")
        cells = first.find_elements("css selector", f"tbody td:nth-child({at + 1})")
        return [None if each.text == "–" else float(each.text.split()[0]) for each in cells]

    for at in (time, whole):
        for rising in (True, False):
            head[at].find_element("css selector", "button").click()
            found = values(at)
            known = [each for each in found if each is not None]
            assert known == sorted(known, reverse=not rising) and len(set(known)) > 2
            assert found[: len(known)] == known  # the others last, either way
            assert head[at].get_attribute("aria-sort") == ("ascending" if rising else "descending")
    head[0].find_element("css selector", "button").click()
    first = browser.find_element("css selector", "table.figures")
    labels = [each.text for each in first.find_elements("css selector", "tbody td:first-child")]
    assert labels == sorted(labels, key=str.lower)
    assert head[whole].get_attribute("aria-sort") is None
    assert len(browser.find_elements("css selector", "table.figures tbody tr")) == rows
    assert errors(browser) == []


def test_without_scripts_the_page_is_whole_and_its_tables_offer_no_sorting(browser, page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page)
        assert browser.find_elements("css selector", "th button") == []
        assert len(browser.find_elements("css selector", "table.figures tbody tr")) > 10
        assert all(texts(browser, "table.figures thead th"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_lines_of_a_sweep_lie_within_their_plot_and_rise_with_what_they_show(browser, tmp_path):
    main([str(static_lengths(tmp_path / "runs")), "-o", str(tmp_path)])
    look(browser, 1280)
    browser.get((tmp_path / "comparison.html").as_uri())
    shoot(browser, "compare_sweep_1280_light")

    for svg in browser.find_elements("css selector", "svg.plane"):
        plane = svg.rect
        for point in svg.find_elements("css selector", "g.curve circle"):
            at = point.rect
            assert plane["x"] <= at["x"] <= plane["x"] + plane["width"]
            assert plane["y"] - 5 <= at["y"] <= plane["y"] + plane["height"]
    names = texts(browser, ".points tbody td:first-child")
    colours = browser.execute_script(
        "return [...document.querySelectorAll('.points i')].map(e => getComputedStyle(e).backgroundColor)"
    )
    lines = browser.execute_script(
        "return [...document.querySelectorAll('g.curve')].map(e => getComputedStyle(e.querySelector('line')).stroke)"
    )
    assert len(names) == 6 and colours == lines  # of the times, and of the memory
    assert {name: len({c for n, c in zip(names, lines, strict=True) if n == name}) for name in names} == dict.fromkeys(
        ("detect_causal", "torch.compile", "upstream"), 1
    )  # a way has one colour
    assert len(set(lines)) == 3
    for width in (390, 1280):
        look(browser, width, "dark")
        assert browser.execute_script("return document.documentElement.scrollWidth") == width


def test_colours_can_be_told_from_the_paper_in_both_schemes(browser, page):
    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for scheme in ("light", "dark"):
        look(browser, 1280, scheme)
        browser.get(page)
        style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        card = luminance(browser.execute_script(style, "figure", "background-color"))
        marks = {".engine": 3, ".fastest": 3, "figure small": 4.5, "figure h3": 4.5}  # WCAG 2.2, 1.4.11 and 1.4.3
        for selector, least in marks.items():
            colour = browser.execute_script(style, selector, "color" if " " in selector else "fill")
            light, dark = sorted((card, luminance(colour)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (scheme, selector)


def test_it_prints_in_light_colours_without_cutting_anything_off(browser, page):
    look(browser, 794, "dark", media="print")  # A4 at 96 dots an inch
    browser.get(page)
    shot = shoot(browser, "compare_print")

    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    assert paper == "rgb(255, 255, 255)"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 794
    assert shot.stat().st_size > 10_000
