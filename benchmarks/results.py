"""docs/results.md, its pictures and the README's: made from the reports and raw rows in ``benchmarks``.

python -m benchmarks.results            # writes them
python -m benchmarks.results --check    # writes nothing; exit code 1 and the names of those that would be changed
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from benchmarks import kernels, profile_tables, speed_up
from benchmarks.generation_table import generation_tables, is_generation, label
from benchmarks.pictures import svg
from benchmarks.speed_up import results
from benchmarks.stacks import ROOT, Measured, caption, measured
from pipeline.compare.baseline import against_baseline, parse_baseline
from pipeline.compare.charts import time_chart
from pipeline.compare.labels import Section, sections
from pipeline.compare.page import table
from pipeline.compare.rows import Measure, Row, row
from pipeline.compare.verdicts import standing
from pipeline.config.axes import has
from pipeline.record import markdown

PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
TEMPLATE = ROOT / "benchmarks" / "results.md.jinja"
PICTURES = ROOT / "docs" / "pictures"
BASELINE = "strategy:upstream"
BEGIN, END = "<!-- made by python -m benchmarks.results -->", "<!-- end of what it made -->"


def prefill_tables(sections_: list[Section], where: str) -> Iterator[str]:
    """A table of prompts for each section, as the comparison's page has it, with how many times as fast as upstream."""
    for section in sections_:
        baseline = parse_baseline(BASELINE, section.rows) if any(map(_is_upstream, section.rows)) else None
        compared: dict[Measure, dict[int, Any]] = defaultdict(dict)
        for against in against_baseline(section, baseline) if baseline else []:
            compared[against.measure][id(against.row)] = against
        shown = table(section, compared, BASELINE if baseline else None)
        measures = "; ".join(map(str, section.measures))
        remarks = "".join(f"{i}. {markdown.cell(text)}\n" for i, text in enumerate(shown.remarks, 1))
        lines = markdown.table(shown.header, (cells for cells, _ in shown.lines))
        yield f"**{section.model}**, {measures}; {where}\n\n{lines}\n{remarks}"


def _is_upstream(each: Row) -> bool:
    return has(each.axes, speed_up.UPSTREAM)


class Figures:
    """What one stack's reports say, as rows of the comparison."""

    def __init__(self, one: Measured, older: bool) -> None:
        self.older = older
        self.where = caption(one.environment)
        self.source = f"{self.where}{'; an older stack than the newest measured' if older else ''}"
        self.prompts = sections([row(found) for found in one.reports if not is_generation(found.report)])
        generating = [(row(found), found.report) for found in one.reports if is_generation(found.report)]
        self.generations = [each for each in sections([one for one, _ in generating]) if each.measures]
        for each, report in generating:
            each.label = label(report).replace("`", "")  # shorter than all that differs, and the table's own
        self.races = [*results(self.prompts, "prefill"), *results(self.generations, "generate")]


def parts(one: Measured, figures: Figures) -> dict[str, Any]:
    """The page's texts about one stack; one is empty where nothing was measured for it."""
    where, races = figures.where, figures.races
    made: dict[str, Any] = {
        "title": one.stack.title,
        "older": figures.older,
        "where": where,
        "notes": [path.read_text(encoding="utf-8") for folder in one.folders for path in folder.glob("notes.md")],
        "speed_up": f"{where}\n\n{markdown.table(speed_up.HEADER, speed_up.lines(races))}" if races else "",
        "generation": generation_tables(found.report for found in one.reports).rstrip(),
        "prompts": "\n".join(prefill_tables(figures.prompts, where)).rstrip(),
    }
    for name, (file, text) in RAW.items():
        paths = [folder / file for folder in one.folders if (folder / file).exists()]
        made[name] = "\n".join(map(text, paths)).rstrip()
    return made


RAW: dict[str, tuple[str, Callable[[Path], str]]] = {
    "drop_in": ("drop_in.jsonl", profile_tables.drop_in),
    "attention": ("kernels.jsonl", kernels.tables),
    "layers": ("steps.jsonl", kernels.tables),
    "layers_together": ("steps_together.jsonl", kernels.tables),
    "prompt_attention": ("prompt_attention.jsonl", profile_tables.prompt_attention),
    "step": ("llama3_1b-decode.json", lambda path: profile_tables.steps(path.parent)),
    "prompt": ("llama3_1b-prompt.json", lambda path: profile_tables.prompts(path.parent)),
}
"""Part of the page -> the file that it is made of, and how."""


def speed_up_picture(figures: Figures) -> str:
    note = (
        "Random weights, fp16, batch 1, device time; every engine was verified. Whisker: 95 % interval; dotted line: "
        "just as fast."
    )
    legend = {css: f"as {name}" for name, css in speed_up.CSS.items()}
    charts = speed_up.charts(figures.races)
    return svg("Proved native attention: how many times as fast", [f"{figures.source}.", note], charts, legend)


def generation_picture(figures: Figures) -> str:
    """Whole generations of each model: every row, with what the card needs at least."""
    charts = []
    for section in figures.generations:
        measure = next(m for m in section.measures if m.kind == "generate" and m.clock == "device_ms")
        chart = time_chart(section, measure, standing(section, measure), {}, set())
        charts.append(replace(chart, title=f"{section.model}, {measure.size}", unit=""))
    note = (
        "Device time, less is better. Whisker: 95 % interval; dotted tick: the least that the card needs (roofline); "
        "⚠: clocks were held back, or times did not settle."
    )
    legend = {"fastest": "fastest", "engine": "TensorRT engine", "rival": "PyTorch"}
    return svg("Whole generations, by strategy and rival", [f"{figures.source}.", note], charts, legend)


def files() -> dict[Path, str]:
    """Every file that is made, and what it holds.  A picture is of the newest stack that has what it shows."""
    found = measured()
    newest = found[0].stack
    stacks = [(one, Figures(one, one.stack[:2] < newest[:2])) for one in found]
    racing = next(figures for _, figures in stacks if figures.races)
    generating = next(figures for _, figures in stacks if figures.generations)
    shown = []
    for one, figures in stacks:
        pictures = {"speed_up_picture": figures is racing, "generation_picture": figures is generating}
        shown.append(parts(one, figures) | pictures)
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = jinja.from_string(TEMPLATE.read_text(encoding="utf-8")).render(stacks=shown)
    picture = f"![How many times as fast proved native attention is; {racing.source}](docs/pictures/speed-up.svg)\n"
    return {
        PAGE: re.sub(r"\n{3,}", "\n\n", page).rstrip() + "\n",
        PICTURES / "speed-up.svg": speed_up_picture(racing),
        PICTURES / "generation.svg": generation_picture(generating),
        README: _between(README.read_text(encoding="utf-8"), picture),
    }


def _between(text: str, made: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: has no place {BEGIN} … {END} for the picture")
    return f"{before}{BEGIN}\n{made}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file would be changed")
    check = parser.parse_args().check
    stale = [(path, text) for path, text in files().items() if not path.exists() or path.read_text("utf-8") != text]
    for path, text in stale:
        print(f"{path.relative_to(ROOT)}: {'is not what the command makes' if check else 'written'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
