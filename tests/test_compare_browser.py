"""The page as a person sees it, in a real browser; screenshots are kept in ``test-artifacts``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import chromium, errors, look, shoot
from reports import varied

from pipeline.compare.__main__ import main

OVERFLOW = """
return [...document.querySelectorAll("figure *, h1, h2, p, li, td, th")]
  .filter(e => !e.closest("svg") && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
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


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def test_every_timed_row_has_a_bar_as_long_as_its_time(browser, page):
    look(browser, 1280)
    browser.get(page)

    prefill = next(f for f in browser.find_elements("css selector", "figure.time") if "Prefill" in f.text)
    bars = prefill.find_elements("css selector", ".bar:not(.ticks)")
    widths = [bar.find_element("css selector", "rect").size["width"] for bar in bars]
    shown_ms = [float(bar.find_element("css selector", ".value").text.split()[0]) for bar in bars]

    assert len(bars) == 10 and shown_ms == sorted(shown_ms)
    scale = widths[0] / shown_ms[0]
    assert widths == pytest.approx([scale * ms for ms in shown_ms], rel=0.02)
    assert errors(browser) == []


def test_rows_without_a_time_are_shown_with_their_reasons(browser, page):
    look(browser, 1280)
    browser.get(page)

    listed = texts(browser, "#without tbody tr")
    in_the_chart = texts(browser, "figure.time .bar .reason")

    assert len(listed) == 3
    oom = 'out_of_memory: needs 141.2 GiB of device memory, 3.1 GiB are free <b>&"quoted" | piped'
    for shown in (listed, in_the_chart):
        assert any(oom in text for text in shown)
        assert any("TensorRT-RTX has no plugins" in text for text in shown)
    assert any("not_executed" in text for text in listed)


def test_figures_of_an_unsupported_gpu_say_so(browser, page):
    look(browser, 1280)
    browser.get(page)

    captions = texts(browser, "table.figures caption")

    assert captions == ["Measured on a GPU that the vendor does not support."] * 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_or_needs_sideways_scrolling(browser, page, width, scheme):
    look(browser, width, scheme)
    browser.get(page)
    shoot(browser, f"compare_{width}_{scheme}")

    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    if width == 1280:  # on a phone the tables scroll within themselves
        assert browser.execute_script(OVERFLOW) == []
    assert errors(browser) == []


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
        marks = {".engine": 3, ".fastest": 3, "figure p": 4.5, "figure h3": 4.5}  # WCAG 2.2, 1.4.11 and 1.4.3
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
