"""Which code of ours a figure is of: a hash over the modules that make, judge and time engines."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import passes

BESIDE_THE_ENGINE = frozenset(
    {"__init__", "__main__", "start", "host", "measure", "record", "tracking", "sweep", "compare"}
)
"""What in ``pipeline`` starts, times, shows or records a run.  All else counts, and with it every room that is yet to
be built: building once too often costs minutes, an engine of other code would cost the truth.  So the verification
counts as well: an entry of the store says that its engine passed *this* verification."""

BESIDE_A_FIGURE = BESIDE_THE_ENGINE - {"measure"}
"""The same of a time that was measured: how it was measured counts too."""


def code_hash(
    roots: tuple[Path, ...] = (Path(passes.__file__).parent, Path(__file__).parent.parent),
    beside: Collection[str] = BESIDE_THE_ENGINE,
) -> str:
    """sha256 over the modules (and texts) of ``passes`` and ``pipeline``, in ``roots``, without those ``beside``."""
    files = {
        f"{root.name}/{path.relative_to(root).as_posix()}": path for root in roots for path in _sources(root, beside)
    }
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _sources(root: Path, beside: Collection[str]) -> list[Path]:
    found = [path for suffix in ("*.py", "*.txt") for path in root.rglob(suffix)]
    if root.name != "pipeline":
        return found
    return [path for path in found if Path(path.relative_to(root).parts[0]).stem not in beside]
