"""docs/results.md, its pictures and the README's: made from the reports and raw rows in ``benchmarks``.

python -m benchmarks.results            # writes them
python -m benchmarks.results --check    # writes nothing; exit code 1 where a file would be changed, or where README.md
                                        # or a page of docs has a figure that is from no report (benchmarks.figures)
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from benchmarks import figures, line_chart, profile_tables, scatter, speed_up
from benchmarks.generation_table import batch_table, generation_tables
from benchmarks.pictures import svg
from benchmarks.prompt_table import NAMES, SWEPT, beside_sweeps, length_table, prompt_tables, sweeps
from benchmarks.shown import Shown
from benchmarks.stacks import ROOT, Measured, aged, caption, measured
from benchmarks.ways import Row, rows
from pipeline.compare.fronts import fronts
from pipeline.compare.labels import sections
from pipeline.compare.pool import pooled
from pipeline.compare.rows import row

PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
TEMPLATE = ROOT / "benchmarks" / "results.md.jinja"
PICTURES = ROOT / "docs" / "pictures"
BEGIN, END = "<!-- made by python -m benchmarks.results -->", "<!-- end of what it made -->"


class Figures:
    """What was measured on one stack."""

    def __init__(self, one: Measured, older: bool) -> None:
        self.one = one
        self.older = older
        self.where = caption(one.environment)
        self.source = f"{self.where}{'; an older stack than the newest measured' if older else ''}"
        self.rows: list[Row] = rows(one.reports)

    @cached_property
    def races(self) -> list[speed_up.Result]:
        prompts = beside_sweeps(self.rows)  # what runs at many lengths has a table of its own
        return list(speed_up.results([*prompts, *(row for row in self.rows if row.task.kind == "generate")]))

    @property
    def generation(self) -> list[speed_up.Result]:
        """The race that the first question is about."""
        return [each for each in self.races if each.race is speed_up.GENERATION]

    @cached_property
    def steps(self) -> dict[str, Any]:
        """The profile of a decode step, by model."""
        found: dict[str, Any] = {}
        for folder in self.one.folders:
            found |= profile_tables.profiles(folder, "decode")
        return found


def race_tables(found: Sequence[speed_up.Result], environment: Mapping[str, Any]) -> str:
    """A table for each race."""
    made = []
    for race in speed_up.RACES:
        mine = [each for each in found if each.race is race]
        if mine:
            shown = Shown([row for each in mine for row in (each.ours, each.theirs)], environment)
            made.append(f"**{race.title}**; {caption(environment)}.{shown.above}\n\n{speed_up.table_of(race, mine)}")
    return "\n".join(made)


def parts(of: Figures, pictures: set[str]) -> dict[str, Any]:
    """The page's texts about one stack, ``pictures`` being those of its own; one is empty where nothing was measured
    for it."""
    one, environment = of.one, of.one.environment
    profiled = next((profile.get("environment") for profile in of.steps.values()), None)
    races = {kind: [each for each in of.races if each.race.kind == kind] for kind in ("generate", "prefill")}
    made: dict[str, Any] = {
        "title": one.stack.title,
        "older": of.older,
        "pictures": pictures,
        "where_profiled": f"{of.where}.{aged(profiled)}",
        "notes": [path.read_text(encoding="utf-8") for folder in one.folders for path in folder.glob("notes.md")],
        "generation_races": race_tables(races["generate"], environment),
        "generation": generation_tables(of.rows, environment),
        "batches": batch_table(of.rows, environment),
        "lengths": length_table(of.rows, environment),
        "prompt_races": race_tables(races["prefill"], environment),
        "prompts": prompt_tables(of.rows, environment),
    }
    for name, part, text in (
        ("step", "decode", profile_tables.steps),
        ("prompt", "prompt", profile_tables.prompts),
    ):
        made[name] = "\n".join(text(folder) for folder in one.folders if profile_tables.profiles(folder, part))
    for name, (file, made_of) in RAW.items():
        paths = [folder / file for folder in one.folders if (folder / file).exists()]
        made[name] = "\n".join(made_of(path, of.where) for path in paths).rstrip()
    return made


def _kernels(path: Path, _: str) -> str:
    from benchmarks import kernels  # which has torch imported

    return kernels.tables(path)


RAW: dict[str, tuple[str, Callable[[Path, str], str]]] = {
    "drop_in": ("drop_in.jsonl", lambda path, _: profile_tables.drop_in(path)),
    "attention": ("kernels.jsonl", _kernels),
    "layers": ("steps.jsonl", _kernels),
    "layers_together": ("steps_together.jsonl", _kernels),
    "prompt_attention": ("prompt_attention.jsonl", profile_tables.prompt_attention),
}
"""Part of the page -> the file that it is made of, and how; the latter takes what the stack's rows were measured on."""


def speed_up_picture(of: Figures) -> str | None:
    """How many times as fast our generation is; None where nothing can be compared."""
    if not of.generation:
        return None
    size = of.generation[0].task.size
    note = (
        f"Random weights, fp16, {size}, device time; every engine was verified. Whisker: 95 % interval; dotted line: "
        "just as fast."
    )
    title = "Generation on TensorRT with proved attention: how many times as fast"
    return svg(title, [f"{of.source}.", note], speed_up.charts(of.generation), {})


def generation_picture(of: Figures) -> str | None:
    """Whole generations of each model, ours and what one would use instead."""
    if not of.generation:
        return None
    note = "Device time in ms, less is better. Whisker: 95 % interval; dotted tick: the least that the card needs."
    legend = {
        "fastest": "ours", "stage-strategy": "torch.compile", "rival": "PyTorch eager", "engine": "Torch-TensorRT",
    }  # fmt: skip
    return svg("Whole generations", [f"{of.source}.", note], speed_up.time_charts(of.generation), legend)


def mask_picture(of: Figures) -> str | None:
    """Time and memory of a prompt by its length; None where no model ran several lengths, or all failed."""
    found = sweeps(of.rows)
    if not found:
        return None
    task, lengths = next(iter(found.items()))
    css = dict(zip(SWEPT, ("fastest", "engine", "stage-strategy"), strict=True))
    names = {name: text.strip("`") for name, text in NAMES.items()}
    panels = []
    for title, unit, log, value in (
        ("Device time", "ms", True, lambda row: row.time.median),
        ("Device memory at its peak", "GB", False, lambda row: (row.median("memory", "peak_bytes") or 0) / 1e9),
    ):
        points = {
            name: {n: value(each[name]) for n, each in lengths.items() if name in each and each[name].time}
            for name in SWEPT
        }
        lines = [line_chart.Line(names[name], css[name], those) for name, those in points.items() if those]
        if not lines:
            return None
        panels.append(line_chart.Panel(title, unit, lines, log))
    note = f"{task.model}, {task.weights} weights, fp16, batch {task.batch}; each engine is of its one length."
    legend = {css[name]: names[name] + " (Torch-TensorRT as it ships)" * (name == "upstream") for name in SWEPT}
    return line_chart.svg("What the mask costs, by the length of the prompt", [f"{of.source}.", note], panels, legend)


def step_picture(of: Figures) -> str | None:
    """Where the time of a decode step goes, each model a bar."""
    if not of.steps:
        return None
    note = "One token over 2176 keys, fp16, batch 1, in us; a step is one CUDA graph."
    charts, legend = [profile_tables.step_chart(of.steps)], profile_tables.STEP_CSS
    return svg("Where a step's time goes", [f"{of.source}.", note], charts, {v: k for k, v in legend.items()})


def quality_picture(of: Figures) -> str | None:
    """What precisions cost and what they are worth, of each model with real weights; None where nothing was measured
    of two of them."""
    found = pooled(row(each) for each in of.one.reports)
    panels = [
        scatter.Panel(section.model, front)
        for section in sections([each for each in found if each.axes.get("model.weights") != "random"])
        for front in fronts(section)
        if "prefill" not in front.title
    ]
    if not panels:
        return None
    note = "Beside the unquantised model, on one real text. Line: what nothing beats in both; whisker: 95 % interval."
    return scatter.svg("Quality against speed and bytes: what is worth having", [f"{of.source}.", note], panels)


MADE: dict[str, Callable[[Figures], str | None]] = {
    "speed-up.svg": speed_up_picture,
    "generation.svg": generation_picture,
    "mask.svg": mask_picture,
    "step.svg": step_picture,
    "quality.svg": quality_picture,
}
"""Picture -> how it is made of what was measured on a stack."""


def files() -> dict[Path, str]:
    """Every file that is made, and what it holds.  A picture is of the newest stack that has what it shows."""
    found = measured()
    newest = found[0].stack
    stacks = [Figures(one, one.stack[:2] < newest[:2]) for one in found]
    pictures: dict[Path, str] = {}
    owners: dict[str, Figures] = {}
    for name, make in MADE.items():
        for of in stacks:
            if (picture := make(of)) is not None:
                pictures[PICTURES / name], owners[name] = picture, of
                break
    shown = [parts(of, {name for name, owner in owners.items() if owner is of}) for of in stacks]
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = jinja.from_string(TEMPLATE.read_text(encoding="utf-8")).render(stacks=shown)
    if "speed-up.svg" not in owners:
        raise ValueError("benchmarks/results: no stack has a generation of ours and of a rival, for README's picture")
    source = owners["speed-up.svg"].source
    picture = f"![How many times as fast generation with proved attention is; {source}](docs/pictures/speed-up.svg)\n"
    if "quality.svg" in owners:
        source = owners["quality.svg"].source
        picture += f"\n![What precisions cost and what they are worth; {source}](docs/pictures/quality.svg)\n"
    return {
        PAGE: re.sub(r"\n{3,}", "\n\n", page).rstrip() + "\n",
        **pictures,
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
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something is not so")
    check = parser.parse_args().check
    made = files()
    stale = [(path, text) for path, text in made.items() if not path.exists() or path.read_text("utf-8") != text]
    unmade = [path for path in PICTURES.glob("*.svg") if path not in made]
    for path, text in stale:
        print(f"{path.relative_to(ROOT)}: {'is not what the command makes' if check else 'written'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in unmade:
        print(f"{path.relative_to(ROOT)}: {'nothing makes it' if check else 'removed'}")
        if not check:
            path.unlink()
    said = figures.check()
    for line in [*said.wrong, *said.older]:
        print(line)
    return int(check and bool(stale or unmade or said.wrong))


if __name__ == "__main__":
    sys.exit(main())
