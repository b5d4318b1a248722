"""What a person sees of a run: its stages as they pass, and a short table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from passes.precision import FEW_BITS
from pipeline.record import markdown
from pipeline.record.report import GRAPH, worst_case

SUMMARY = "summary.md"
"""What the console says at the end, beside report.json: the run's description in MLflow."""


class StageDisplay:
    """One line a stage, live while it runs where the console is a terminal: on standard error.  What the run found goes
    to standard output.  A ``console`` that is given takes both."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._found = console or Console(highlight=False)
        self._status: Status | None = None
        self._stage = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage = name
        with self.console.status(Text(name, "bold")) as self._status:
            try:
                yield
            finally:
                self._status = None

    def update(self, message: str) -> None:
        """Replace what is shown beside the running stage."""
        if self._status is not None:
            self._status.update(Text.assemble((self._stage, "bold"), "  ", message))

    def steps(self, message: str, done: int, total: int) -> bool:
        """Progress in steps; the shape of TensorRT's progress monitor (True: go on)."""
        self.update(f"{message}  {done}/{total}")
        return True

    def done(self, name: str, seconds: float, detail: str = "") -> None:
        self.console.print(Text.assemble(("✓", "green"), f" {name:<10}{seconds:7.1f} s  ", (detail, "dim")))

    def failed(self, name: str, seconds: float, message: str) -> None:
        self.console.print(Text.assemble(("✗", "red"), f" {name:<10}{seconds:7.1f} s  ", (message, "red")))

    def note(self, message: str) -> None:
        self.console.print(Text.assemble(("!", "yellow"), " ", message))

    def summary(self, report: dict[str, Any], folder: Path, tracked: str | None) -> None:
        """What ``report`` says, in a few lines; the last one is the path of report.json and nothing else.  Where it is
        piped, no line is wrapped."""
        rows = [(label, Text.assemble(*parts)) for label, *parts in _summary_rows(report)]
        together = self._found is self.console or (self._found.is_terminal and self.console.is_terminal)
        if not together:  # notes went to another file, or to none: what to do next is among them
            rows += [("note", Text(note)) for note in report["notes"]]
        if tracked:
            rows.append(("MLflow", Text(tracked)))
        self.console.print()
        if self._found.is_terminal:
            table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
            table.add_column(style="dim")
            table.add_column(overflow="fold")  # a path is no use with an ellipsis in it
            for label, text in rows:
                table.add_row(label, text)
            self._found.print(table)
        else:
            for label, text in rows:
                self._found.print(Text(f"{label:<10}  ").append_text(text), soft_wrap=True)
        if (path := folder / "report.json").is_file():
            self._found.print(Text(str(path)), soft_wrap=True)


def described(report: dict[str, Any]) -> str:
    """What :meth:`StageDisplay.summary` shows of ``report``, as a Markdown table."""
    lines = [
        (label, "".join(p if isinstance(p, str) else p[0] for p in parts)) for label, *parts in _summary_rows(report)
    ]
    return markdown.table(lines[0], lines[1:])


Part = str | tuple[str, str]
"""Text as it is, never markup: a path or a setting may hold brackets; with a style or without."""


def _summary_rows(report: dict[str, Any]) -> Iterator[tuple[str, *tuple[Part, ...]]]:
    colour = {"ok": "green", "not_executed": "yellow", "unavailable": "yellow", "failed": "red"}[report["status"]]
    meaning = {"not_executed": "  (no GPU could run the engine: nothing was timed)"}.get(report["status"], "")
    yield "status", (report["status"], colour), meaning
    if report["failure"]:
        yield "failure", "{stage}: {kind}: {message}".format(**report["failure"])
    if attention := report["attention"]:
        summary = attention["summary"]
        masks = ", ".join(f"{count} {kind}" for kind, count in summary["by_mask"].items())
        actions = ", ".join(f"{count} {kind}" for kind, count in summary["by_action"].items())
        yield "attention", f"{len(attention['calls'])} calls: {masks} → {actions}"
    if engine := report["engine"]:
        size = f", {engine['bytes'] / 1e6:.0f} MB" if engine["bytes"] else ""
        yield (
            "network",
            f"{engine['layers']} layers: {engine['iattention']} native attention "
            f"({engine['iattention_causal']} causal, {engine['iattention_masked']} masked), "
            f"{engine['softmax']} softmax{size}",
        )
        if few := _few_bits(report):
            yield "weights", few
        if len(profiles := engine["profiles"] or ()) > 1:
            yield (
                "profiles",
                ", ".join(f"{least}..{most}" if least < most else str(most) for least, _, most in profiles),
            )
        for note in engine["notes"]:
            yield "", note
    if store := report["store"]:
        seconds = sum(store["stages_s"].values())
        spared = f": no {', '.join(store['stages'])}; {seconds:.1f} s spared" if store["hit"] else ""
        yield "store", f"{'hit' if store['hit'] else 'miss'} {store['key'][:12]}{spared}"
    if verify := report["verify"]:
        worst, alone = worst_case(verify), verify["executed"] == GRAPH
        yield (
            "verified",
            f"{verify['executed']}{', no engine was executed' if alone else ''}"
            f"{' (when it was stored)' if verify['stored'] else ''}: "
            f"{'passed' if verify['passed'] else 'FAILED'}, {len(verify['cases'])} cases; "
            f"worst {worst['name']}: relative error {worst['relative_error']:.2g} (allowed {worst['tolerance']:.2g}), "
            f"top-1 {worst['top1_agreement']:.1%}",
        )
        position = worst["worst_position"]
        found = "no number" if position["found"] is None else f"{position['found']:.2g}"
        yield (
            "",
            f"nearest to its limit: row {position['row']}, position {position['position']}, {position['measure']} "
            f"{found} (allowed {position['allowed']:.2g})",
        )
        yield "judged in", verify["arithmetic"]
        if outside := verify["outside"]:
            worst = outside["worst"]
            yield (
                "outside",
                f"{', '.join(outside['assumed'])}: not judged, {len(outside['cases'])} cases; worst {worst['name']}: "
                f"relative error {worst['relative_error']:.2g}, top-1 {worst['top1_agreement']:.1%}",
            )
        if answer := verify["answer"]:
            yield "answer", f"“{answer['candidate']}”{' (the graph, in PyTorch)' if alone else ''}"
    if quality := report.get("quality"):  # none in a report of before
        yield from _quality_rows(quality)
    benchmark = report["benchmark"] or {"prefill": None, "prefill_shapes": [], "generate": None}
    chunk = report["config"]["cache"].get("chunk")
    if engine and chunk:
        yield "prompts", f"in chunks of {chunk} tokens, over the cache"
    for entry in filter(None, (benchmark["prefill"], *benchmark["prefill_shapes"])):
        fraction = f", {entry['roofline_fraction']:.0%} of the roofline" if entry["roofline_fraction"] else ""
        yield (
            "prefill",
            f"{entry['batch']}×{entry['input_length']}: {entry['device_ms']['median']:.2f} ms on the device, "
            f"{entry['host_ms']['median']:.2f} ms on the host, {entry['tokens_per_s']:.0f} tokens/s{fraction}",
            _tainted(entry),
        )
    if generate := benchmark["generate"]:
        fraction = f", {generate['roofline_fraction']:.0%} of the roofline" if generate["roofline_fraction"] else ""
        yield (
            "generation",
            f"{generate['batch']}×{generate['input_length']}+{generate['output_length']}: "
            f"{generate['device_ms']['median']:.1f} ms on the device, first token {generate['ttft_ms']['median']:.2f} "
            f"ms, then {generate['tpot_ms']['median']:.3f} ms a token{fraction}",
            _tainted(generate),
        )
    yield "stages", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["stages_s"].items())


def _quality_rows(quality: dict[str, Any]) -> Iterator[tuple[str, *tuple[Part, ...]]]:
    cost, limit = quality["cost"], quality["max_increase"]
    if cost is None:
        yield "quality", f"not judged: {quality['not_judged']}"
        return
    allowed = "" if limit is None else f", allowed {limit:+.2%}"
    verdict = "passed" if quality["passed"] else "FAILED"
    yield (
        "quality",
        f"{verdict}: perplexity {_estimated(cost['perplexity'], '.4g')}, {cost['reference']} "
        f"{_estimated(cost['reference_perplexity'], '.4g')}: {_estimated(cost['increase'], '+.2%')}{allowed}",
    )
    greedy, kl, top1 = cost["greedy"], _said(cost["kl"], ".2g"), _said(cost["top1_agreement"], ".1%")
    parted = f"{greedy['parted']} of {greedy['texts']} greedy texts part within {greedy['tokens']} tokens" + (
        f", first at token {greedy['first_token']}" if greedy["parted"] else ""
    )
    yield "", f"KL {kl}, top-1 {top1}, over {cost['tokens']} tokens of {cost['text']}; {parted}"


def _said(number: float | None, form: str) -> str:
    """What is no number is null in a report."""
    return "no number" if number is None else f"{number:{form}}"


def _estimated(estimate: dict[str, Any], form: str) -> str:
    """A number with its interval, where that says more."""
    value, low, high = (_said(estimate[name], form) for name in ("value", "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"


def _few_bits(report: dict[str, Any]) -> str:
    """What the engines hold by type, where one has weights of few bits."""
    engines = {"engine": report["engine"], "decode": (report["decode"] or {}).get("engine")}
    held = {name: (each or {}).get("weights") or {} for name, each in engines.items()}
    if not any(name in each for few in FEW_BITS.values() for name in (few.kind, few.name) for each in held.values()):
        return ""
    said = {name: ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in each.items() if size >= 50_000)
            for name, each in held.items() if each}  # fmt: skip
    return "; ".join(said.values()) if len(said) == 1 else "; ".join(f"{name}: {text}" for name, text in said.items())


def _tainted(entry: dict[str, Any]) -> Part:
    return (f"  tainted: {'; '.join(entry['tainted'])}", "yellow") if entry["tainted"] else ""
