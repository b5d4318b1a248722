"""Text of any kind in tables of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from markupsafe import escape


def cell(text: object) -> str:
    """``text`` so that it stays one cell and shows as it is: Markdown knows HTML."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", str(escape(flat)).replace("&#39;", "'").replace("&#34;", '"'))


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table whose cells show as they are."""
    rows = [header, ("---",) * len(header), *([cell(each) for each in line] for line in lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
