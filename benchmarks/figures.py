"""Figures in prose: each says which kept report or raw row it is from, and is compared with it.

A paragraph, or a point of a list, that has measured figures holds a comment with one entry for each:

    One token takes 1.16 ms, and the wheel is 93 MB.
    <!-- figures: 1.16 = [llama3_1b-detect_causal-fp16-generate-in_engine benchmark.generate.tpot_ms.median];
    93 MB: what PyPI serves -->

``FIGURE = EXPRESSION`` is measured: what stands in brackets is a file of ``benchmarks/results`` or ``profiles`` (of the
newest stack that has it, unless its folder is named), the place of a number in it, and of a ``.jsonl`` the fields that
choose its row (``[kernels.jsonl us form=native model=llama3_1b size=2048]``); around brackets there may be arithmetic.
Rounded to as many digits as are printed, it has to be the figure.  ``FIGURE: WHY`` is none that was measured here.

A figure is a number with a unit of measurement.  Blocks of code, code in a line, and tables that a command makes are
none of it.
"""

from __future__ import annotations

import ast
import json
import operator
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.profile_tables import PROMPT_ROLES, by_group, by_role
from benchmarks.stacks import ROOT, environment_of, is_older, measured, rows_of

NUMBER = r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
UNIT = r"(?:ms|us|[µμ]s|ns|s|minutes|[TG]B/s|TFLOP/s|[KMG]i?B|W|%|per cent|times|×(?! ?\d))(?![\w/])"
JOINED = r"(?: ?[-–/] ?|, | and | to | or )"
FIGURES = re.compile(rf"({NUMBER}(?:{JOINED}\d[\d.,]*)*)[ -]?({UNIT})")
NAMES = re.compile(r"95 %|NVIDIA H\d+ \d+GB")
"""What an interval, or a card, is called: no figures."""
COMMENT, NAMED = re.compile(r"<!--(.*?)-->", re.DOTALL), re.compile(r"\s*figures:(.*)", re.DOTALL)
ENTRY = re.compile(rf"({NUMBER})(?: ?({UNIT}))?\s*(=|:)\s*(.+)", re.DOTALL)
MADE = ("results.md", "architectures.md", "masks-by-call.md")
"""Pages whose tables are made by a command; of those behind the first the rest as well."""


@dataclass
class Said:
    wrong: list[str] = field(default_factory=list)
    """Figures that are from no report, or are not what it says: a line each."""
    older: list[str] = field(default_factory=list)
    """Figures of older code than this: a line for each page that has some."""


class Value(NamedTuple):
    number: float
    older: bool


class NotThere(Exception):
    """What an expression names is not there, in one line."""


def pages() -> list[Path]:
    return [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in MADE[1:])]


def check(of: Iterable[Path] | None = None, folders: Iterable[Path] | None = None) -> Said:
    """What the pages ``of`` say that the reports in ``folders``, the newest first, do not."""
    said = Said()
    kept = list(folders) if folders is not None else [folder for one in measured() for folder in one.folders]
    for page in of or pages():
        name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name
        older = []
        for start, block in blocks(page.read_text(encoding="utf-8"), tables=page.name not in MADE):
            entries = list(_entries(block))
            prose = COMMENT.sub(_blank, block)
            for line, number, unit in _figures(prose, start):
                if not any(entry[0] == number and entry[1] in ("", unit) for entry in entries):
                    said.wrong.append(f"{name}:{line}: {number} {unit}: is from no report (see benchmarks/figures.py)")
            for number, unit, sign, meant in entries:
                at = f"{name}:{start}: {number}{' ' if unit else ''}{unit}"
                if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", prose):
                    said.wrong.append(f"{at}: stands in the comment and not in the text")
                elif sign == "=":
                    try:
                        value = evaluated(meant, kept)
                    except NotThere as reason:
                        said.wrong.append(f"{at}: {reason}")
                        continue
                    if not _rounds_to(value.number, number):
                        said.wrong.append(f"{at}: the report says {value.number:.6g}")
                    elif value.older:
                        older.append(number)
        if older:
            said.older.append(f"{name}: of older code: {', '.join(older)}")
    return said


def blocks(text: str, tables: bool = True) -> Iterator[tuple[int, str]]:
    """Paragraphs, headings, lines of tables and points of lists, with the number of their first line; code blanked."""
    text = re.sub(r"^ *```.*?^ *```", _blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", _blank, text)
    begin, held, inside = 1, list[str](), False
    for number, line in enumerate(text.split("\n"), 1):
        begins = not inside and bool(re.match(r" *([*+-] |\d+\. |#|\|)", line) or not line.strip())
        if begins and held:
            yield begin, "\n".join(held)
            held = []
        inside = line.rfind("<!--") > line.rfind("-->") if "<!--" in line or "-->" in line else inside
        if line.strip() and (tables or not line.startswith("|")):
            begin = begin if held else number
            held.append(line)
    if held:
        yield begin, "\n".join(held)


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def _figures(prose: str, start: int) -> Iterator[tuple[int, str, str]]:
    """Line, number and unit of each figure of a block."""
    text = NAMES.sub(_blank, prose)
    for found in FIGURES.finditer(re.sub(r"\n", " ", text)):
        for number in re.findall(NUMBER, found[1]):
            yield start + text.count("\n", 0, found.start()), number, found[2]


def _entries(block: str) -> Iterator[tuple[str, str, str, str]]:
    """Number, unit, ``=`` or ``:``, and the rest of each entry."""
    for comment in COMMENT.findall(block):
        if named := NAMED.fullmatch(comment):
            for text in named[1].split(";"):
                entry = ENTRY.fullmatch(" ".join(text.split()))
                if entry is None:
                    raise ValueError(f"{text.strip()!r}: is written FIGURE = EXPRESSION or FIGURE: WHY")
                yield entry[1], entry[2] or "", entry[3], entry[4]


def _rounds_to(value: float, printed: str) -> bool:
    """Whether ``value`` is ``printed`` when it is rounded to its digits."""
    mantissa, _, exponent = printed.replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(value - float(printed.replace(",", ""))) <= unit * 0.5000001


OPERATIONS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def evaluated(expression: str, folders: list[Path]) -> Value:
    """The value of ``expression``; raises :class:`NotThere`."""
    found: list[Value] = []

    def kept(match: re.Match[str]) -> str:
        found.append(referred(match[1], folders))
        return f"kept[{len(found) - 1}]"

    def of(node: ast.expr) -> float:
        match node:
            case ast.BinOp() if type(node.op) in OPERATIONS:
                return OPERATIONS[type(node.op)](of(node.left), of(node.right))
            case ast.Constant(value=int() | float() as value):
                return float(value)
            case ast.Subscript(slice=ast.Constant(value=int() as place)):
                return found[place].number
        raise NotThere(f"{expression}: is no arithmetic")

    try:
        tree = ast.parse(re.sub(r"\[([^\]]+)\]", kept, expression), mode="eval")
    except SyntaxError:
        raise NotThere(f"{expression}: is no arithmetic") from None
    number = of(tree.body)
    if not found:
        raise NotThere(f"{expression}: names no report")
    return Value(number, any(value.older for value in found))


def referred(text: str, folders: list[Path]) -> Value:
    """What stands between brackets."""
    name, *rest = shlex.split(text)
    wanted = dict(part.split("=", 1) for part in rest if "=" in part)
    path = " ".join(part for part in rest if "=" not in part)
    file = _file(name, folders)
    if file.suffix == ".jsonl":
        every = rows_of(file)
        rows = [row for row in every if all(str(row.get(key)) == value for key, value in wanted.items())]
        rows = [row for row in rows if path.partition(".")[0] in row]
        if len(rows) != 1:
            raise NotThere(f"[{text}]: {len(rows)} rows of {file.name} are so")
        content, environment = rows[0], environment_of(rows) or environment_of(every)
    else:
        content = json.loads(file.read_text(encoding="utf-8"))
        environment = content.get("environment") or {}
        if "kernels" in content:
            content |= _parts(content, prompt="-prompt" in file.name)
    return Value(_number(content, path, text), is_older(environment))


def _parts(profile: Mapping[str, Any], prompt: bool) -> dict[str, float]:
    """Microseconds of what the tables put together, by the first word of its name: ``products``, ``gaps``."""
    roles = by_role(profile["kernels"], PROMPT_ROLES) if prompt else {}
    groups = {role: sums["us"] for role, sums in roles.items()} or by_group(profile)
    return {re.split(r"\W", name)[0]: us for name, us in groups.items()}


def _file(name: str, folders: list[Path]) -> Path:
    folder, _, last = name.rpartition("/")
    names = (last,) if last.endswith((".json", ".jsonl")) else (f"{last}.json",)
    for each in folders:
        if not folder or each.name == folder:
            for path in (each / one for one in names):
                if path.is_file():
                    return path
    raise NotThere(f"{name}: no such report or file of raw rows")


def _number(content: Mapping[str, Any], path: str, text: str) -> float:
    value: Any = content
    try:
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        return float(value)
    except (KeyError, IndexError, TypeError, ValueError):
        raise NotThere(f"[{text}]: no number there") from None
