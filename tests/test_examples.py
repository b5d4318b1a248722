"""The programs of ``examples/`` run, on a CPU up to where an engine would be compiled, and are short."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import passes

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHOWN = {
    "rewrite_before_compile": ["causal, proved -> rewritten_causal", "PyTorch, before and after: "],
    "native_attention": ["hangs on real", "converted by us: [True]", "rows that see nothing are 0 in PyTorch: True"],
    "register": ["before:\n  mask expand", "after:\n  mask None, {'scale': 0.1767766952966369, 'enable_gqa': True}"],
}


def run(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.main()
    finally:
        if name == "register":
            passes.unregister()


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_runs_and_shows_what_its_first_lines_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(name)
    shown = capsys.readouterr().out
    assert [line for line in SHOWN[name] if line not in shown] == []


def test_every_example_is_tested_and_has_under_60_lines() -> None:
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lines.keys() == SHOWN.keys() and max(lines.values()) < 60
