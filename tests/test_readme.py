"""The README says what the repository holds."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_two_commands_are_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "pip install -e '.[rtx]' && python -m pipeline" in readme
    assert "pip install -e '.[rtx,test]' && pytest" in readme


def test_the_examples_about_masks_print_what_the_document_shows() -> None:
    """The page's Python blocks, run one after the other; the names of shape symbols are torch's own business."""
    page = (ROOT / "docs" / "masks.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    shown = "".join(re.findall(r"```text\n(.*?)```", page, re.DOTALL))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"__name__": "a script"})
    assert re.sub(r"\bs\d+\b", "s", printed.getvalue()) == re.sub(r"\bs\d+\b", "s", shown)
