"""Who imports whom, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Arrow(NamedTuple):
    source: str
    target: str
    """Both are modules, dotted."""


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> dict[str, Path]:
    return {module(path): path for path in sorted((ROOT / package).rglob("*.py"))}


def room(name: str) -> str:
    """The folder of ``pipeline`` or ``passes`` that a module is in, or the module itself where it is in none."""
    return name.split(".")[1] if "." in name else name


def imports(package: str) -> Iterator[Arrow]:
    """Every import among the modules of ``passes`` and ``pipeline`` that a module of ``package`` makes, inside of
    functions too; not those for types alone."""
    known = modules("passes").keys() | modules("pipeline").keys()
    for name, path in modules(package).items():
        for node in _run(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [
                    full if (full := f"{node.module}.{alias.name}") in known else str(node.module)
                    for alias in node.names
                ]
            else:
                continue
            yield from (Arrow(name, target) for target in found if target in known)


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below ``node`` that are run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _run(child)
