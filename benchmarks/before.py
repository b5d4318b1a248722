"""What an older stack took: medians of reports that are no longer in the tree, beside those that took their place.

``python -m benchmarks.before FOLDER...`` adds those of the reports in ``benchmarks/results`` to ``before.json``, each
with the sha256 of its file and the commit in whose tree that file is: ``git show COMMIT:FILE``.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from benchmarks.stacks import ROOT, stack_of
from benchmarks.ways import Task, Way, rows
from pipeline.compare.sources import read

KEPT = ROOT / "benchmarks" / "before.json"


@dataclass(frozen=True)
class Before:
    """A median of a report that is no longer here."""

    task: Task
    way: Way
    ms: float
    """Device time."""
    file: str
    sha256: str
    commit: str


@cache
def earlier(path: Path = KEPT) -> dict[str, dict[tuple[Task, Way], Before]]:
    """By stack."""
    if not path.exists():
        return {}
    found = {}
    for stack, kept in json.loads(path.read_text(encoding="utf-8")).items():
        each = [Before(**one | {"task": Task(**one["task"]), "way": _way(one["way"])}) for one in kept]
        found[stack] = {(one.task, one.way): one for one in each}
    return found


def _way(content: dict[str, object]) -> Way:
    options = content["options"]
    assert isinstance(options, list)
    return Way(**content | {"options": tuple(options)})  # type: ignore[arg-type]


def of_folder(folder: Path) -> tuple[str, list[Before]]:
    """The stack that the reports of ``folder`` are of, and their medians."""
    found, _ = read([str(folder)], "", lambda report: report)
    made = []
    for row in rows(found):
        if row.time is not None:
            file = Path(row.found[0].name).resolve()
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            name = str(file.relative_to(ROOT))
            made.append(Before(row.task, row.way, row.time.median, name, digest, _commit(name)))
    stacks = {stack_of(each.report["environment"]).title for each in found if each.report["status"] == "ok"}
    (stack,) = stacks
    return stack, made


def _commit(file: str) -> str:
    """The commit that last changed ``file``."""
    command = ["git", "log", "-1", "--format=%H", "--", file]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    for folder in map(Path, sys.argv[1:]):
        stack, made = of_folder(folder)
        kept.setdefault(stack, []).extend(
            asdict(one) | {"task": one.task._asdict(), "way": one.way._asdict()} for one in made
        )
    lines = [f"{json.dumps(stack)}: [\n{_lines(each)}\n]" for stack, each in kept.items()]
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


def _lines(entries: list[dict[str, object]]) -> str:
    return ",\n".join(json.dumps(each) for each in entries)


if __name__ == "__main__":
    sys.exit(main())
