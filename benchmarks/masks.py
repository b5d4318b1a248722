"""The table of masks: every architecture and call form, its masks' classes proved and checked by brute force.

python -m benchmarks.masks                       # the table: half an hour of two cores
python -m benchmarks.masks --only llama,gpt2     # a part of it
python -m benchmarks.masks --write               # into docs/masks-by-call.md

Exit code 1 where a proof was contradicted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch.export import ExportedProgram

from benchmarks.architectures import VARIANTS, build
from benchmarks.brute_force import MaskGraph, Run, confirms, contradiction, parameters, runs, truths
from benchmarks.call_forms import BATCH, FORMS, LONGEST, CallForm, export
from passes.proof.calls import AttentionCall, find_calls
from passes.proof.masks import Proof, Status, prover_of

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "masks-by-call.md"


@dataclass(frozen=True)
class CheckedCall:
    """One attention call: what was proved and what brute force says."""

    name: str
    proof: Proof
    truths: list[str] = field(default_factory=list)
    """The droppable classes that describe its mask on every input tried; empty where it has no mask."""
    contradiction: str | None = None
    size: int | None = None
    """The width of a sliding window, the size of a chunk (tokens)."""

    @property
    def complete(self) -> bool:
        """Whether the proof found what is true."""
        return not self.truths or (self.proof.status is Status.PROVED and self.proof.mask.name in self.truths)


@dataclass(frozen=True)
class Cell:
    """One architecture in one call form and shape; ``reason`` says why there are no calls."""

    architecture: str
    form: str
    shape: str
    calls: list[CheckedCall] = field(default_factory=list)
    reason: str = ""

    @property
    def text(self) -> str:
        kinds = Counter(_kind(call) for call in self.calls)
        return ", ".join(kinds)


def _kind(call: CheckedCall) -> str:
    conditions = " and ".join(name.replace("_", " ") for name in call.proof.conditions)
    kind = call.proof.mask.name.replace("_", " ") + (f" {call.size}" if call.size else "")
    kind += f" (droppable if {conditions})" if conditions else ""
    return kind if call.complete else f"{kind} (unproved: {call.truths[0].replace('_', ' ')})"


def prove(program: ExportedProgram) -> list[tuple[AttentionCall, Proof]]:
    """Every attention call of a prepared program and the class of its mask."""
    prover = prover_of(program)
    return [(call, prover.prove(call)) for call in find_calls(program.graph_module)]


def check(program: ExportedProgram, form: CallForm, shape: str) -> list[CheckedCall]:
    """The calls of ``program``, which was exported for ``form`` and ``shape``."""
    proved = prove(program)
    graph = MaskGraph(program, [call for call, _ in proved])
    seen: list[list[Run]] = [[] for _ in proved]
    for masks in runs(graph, form, shape):
        for each, run in zip(seen, masks, strict=True):
            each += [] if run is None else [run]
    return [
        CheckedCall(call.name, proof)
        if call.mask is None
        else CheckedCall(call.name, proof, truths(each), _against(proof, each, graph, index), _size(proof, each))
        for index, ((call, proof), each) in enumerate(zip(proved, seen, strict=True))
    ]


def _against(proof: Proof, seen: list[Run], graph: MaskGraph, index: int) -> str | None:
    """What brute force says against the proof of call ``index`` or against its counterexample."""
    if proof.counterexample is not None and not confirms(graph, index, proof.counterexample):
        return f"the counterexample {proof.counterexample} is none"
    return contradiction(proof, seen)


def _size(proof: Proof, seen: list[Run]) -> int | None:
    if proof.mask.name not in ("sliding_window", "chunked"):
        return None
    return min((size for _, size in parameters(proof.mask.name, seen)), default=None)


def cells(architecture: str) -> list[Cell]:
    """The architecture's row, one cell for each form and shape."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    every = [(form, shape) for form in FORMS for shape in form.shapes]
    try:
        model = build(architecture)
    except ValueError as error:
        return [Cell(architecture, form.name, shape, reason=_first_line(error)) for form, shape in every]
    found = []
    for form, shape in every:
        try:
            program = export(model, form, shape)
        except Exception as error:  # whatever torch or the model raises is the row's outcome
            found.append(Cell(architecture, form.name, shape, reason=_first_line(error)))
            continue
        calls = check(program, form, shape)
        found.append(Cell(architecture, form.name, shape, calls, "" if calls else "no attention op in the graph"))
    return found


def _first_line(error: Exception) -> str:
    """The exception's first line; where torch.export lists violated constraints, the first of these."""
    lines = str(error).strip().splitlines() or [""]
    listed = [line.strip(" -") for line in lines if line.startswith("  - ")]
    return f"{type(error).__name__}: {(listed or lines)[0][:160]}"


def summary(table: list[Cell]) -> str:
    """Calls, soundness, completeness and cost, in a few lines."""
    calls = [(cell, call) for cell in table for call in cell.calls]
    true = [call for _, call in calls if call.truths]
    proved = sum(call.complete for call in true)
    wrong = sum(call.contradiction is not None for _, call in calls)
    slowest = max(calls, key=lambda pair: pair[1].proof.seconds, default=None)
    cost = "no proof"
    if slowest is not None:
        cell, call = slowest
        cost = f"{call.proof.seconds:.2f} s ({cell.architecture}, {cell.form}, {cell.shape} shape)"
    return (
        f"{len({cell.architecture for cell in table})} architectures, {len(table)} graphs "
        f"({sum(bool(cell.reason) for cell in table)} not made), {len(calls)} attention calls.\n"
        f"Sound: {'yes' if not wrong else f'NO, {wrong} proofs contradicted'}.\n"
        f"Complete: {proved} of {len(true)} calls that are causal, lower-right or full on every input tried are "
        f"proved so ({proved / max(len(true), 1):.1%}).\n"
        f"Slowest proof: {cost}.\n"
    )


def markdown(table: list[Cell]) -> str:
    """The document."""
    reasons: dict[str, int] = {}
    names = list(dict.fromkeys(cell.architecture for cell in table))
    only = "" if names == list(VARIANTS) else f' --only "{",".join(names)}"'
    parts = [
        "# Masks across architectures\n\n"
        "What the mask of each attention call is, for tiny random models of transformers' own classes in every way "
        "that they are called, and whether that is proved.  "
        f"Each proof was compared with the mask itself, computed for every length up to {LONGEST}, "
        f"{BATCH} rows of padding and positions at a time.\n\n"
        f"Made by `python -m benchmarks.masks --write{only}` with torch {torch.__version__.partition('+')[0]} and "
        f"transformers {transformers.__version__}.\n\n{summary(table)}\n"
        "A cell names the classes of the graph's calls, of a static and of a dynamic shape where they differ "
        "(static · dynamic); a number says below why there is no such graph.  "
        "A static cache of a windowed layer counts its tokens in Python, which torch.export makes a constant: "
        "its graph, and so its class, is that of an empty cache.\n"
    ]
    found = {(cell.architecture, cell.form, cell.shape): cell for cell in table}
    for title, forms in (
        ("Without a cache", [form for form in FORMS if form.cache == "none"]),
        ("Dynamic cache", [form for form in FORMS if form.cache == "dynamic"]),
        ("Static cache", [form for form in FORMS if form.cache == "static"]),
    ):
        header = ["architecture", *(form.name.removeprefix(f"{form.cache} cache, ") for form in forms)]
        parts.append(f"\n## {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}\n")
        for name in names:
            row = [_cell([found[name, form.name, shape] for shape in form.shapes], reasons) for form in forms]
            parts.append(f"| {name} | {' | '.join(row)} |\n")
    parts.append("\n## Why there is no graph\n\n")
    parts += [f"{number}. `{reason}`\n" for reason, number in reasons.items()]
    return "".join(parts)


def _cell(shapes: list[Cell], reasons: dict[str, int]) -> str:
    texts = [
        f"— ({reasons.setdefault(cell.reason, len(reasons) + 1)})" if cell.reason else cell.text for cell in shapes
    ]
    return " · ".join(dict.fromkeys(texts))


def _lines(row: list[Cell]) -> Iterator[str]:
    if len({cell.reason for cell in row}) == 1 and row[0].reason:
        yield f"{row[0].architecture:20} {row[0].reason}"
        return
    for cell in row:
        where = f"{cell.architecture:20} {cell.form:40} {cell.shape:8}"
        yield f"{where} {cell.text or cell.reason}"
        for call in cell.calls:
            if call.contradiction:
                yield f"{where} UNSOUND: {call.name}: {call.contradiction} ({call.proof.reason})"
            elif not call.complete:
                yield f"{where} incomplete: {call.name} is {' and '.join(call.truths)}: {call.proof.reason}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(VARIANTS), help="architectures, separated by commas")
    parser.add_argument("--write", action="store_true", help="write the document")
    parser.add_argument("--to", type=Path, default=DOCUMENT, help=f"the document; {DOCUMENT.name}")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    asked = parser.parse_args()
    names = asked.only.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"--only={unknown[0]}: must be of {', '.join(VARIANTS)}")
    table: list[Cell] = []
    with multiprocessing.get_context("spawn").Pool(asked.jobs, maxtasksperchild=8) as pool:
        for row in pool.imap(cells, names):
            table += row
            print("\n".join(_lines(row)), flush=True)
    print(summary(table))
    if asked.write:
        asked.to.parent.mkdir(exist_ok=True)
        asked.to.write_text(markdown(table))
    return int(any(call.contradiction for cell in table for call in cell.calls))


if __name__ == "__main__":
    sys.exit(main())
