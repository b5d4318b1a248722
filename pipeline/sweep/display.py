"""What a person sees of a sweep: a line for each job that is over, and one for the whole with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.sweep.jobs import at, headline, read_rows


def line(label: str, report: dict[str, Any], folder: Path, seconds: float, skipped: bool) -> str:
    """One job, over."""
    if report["status"] == "failed":
        why = "{stage}: {kind}: {message}".format(**report["failure"])
        return f"✗ {label}  {seconds:.1f} s  {why}  {folder}"
    path = headline(report)
    number = "" if path is None else f"  {at(report, path):.2f} ms"
    took = "finished before" if skipped else f"{seconds:.1f} s"
    return f"✓ {label}  {took}  {report['status'].replace('_', ' ')}{number}  {folder}"


class _Progress:
    """Counts the rows on disk, so it does not matter which process, or machine, does the jobs."""

    def __init__(self, rows: Path, total: int | None) -> None:
        self.rows, self.total, self.began = rows, total, time.monotonic()

    def __rich__(self) -> Text:
        rows = read_rows(self.rows).values()
        took = [row.seconds for row in rows if not row.skipped]
        passed = time.monotonic() - self.began
        shown = f"{len(rows)}{f' of {self.total}' if self.total else ''} jobs, {passed / 60:.0f} min"
        if took and self.total:
            left = max(0.0, passed / len(took) * (self.total - len(rows)))
            shown += f", {left / 60:.0f} min left"
        return Text(shown, style="bold")


@contextmanager
def live(rows: Path, total: int | None) -> Iterator[None]:
    """The line of the whole sweep, where the console is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with Live(_Progress(rows, total), console=console, refresh_per_second=1, transient=True):
        yield
