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


# The picture of the house, docs/architecture.md: python tests/imports.py writes it


def picture() -> str:
    """The rooms and their arrows as a Mermaid flowchart, without those that a longer way says as well."""
    lines = ["```mermaid", "flowchart TD"]
    for package in ("pipeline", "passes"):
        below: dict[str, set[str]] = {}
        for arrow in imports(package):
            source, target = room(arrow.source), room(arrow.target)
            if arrow.target.startswith(package) and len({source, target, package, "start"}) == 4:
                below.setdefault(source, set()).add(target)
        lines.append(f"  subgraph {package}")
        for source, targets in sorted(below.items()):
            longer = {far for near in targets for far in _reach(below, near)}
            lines += [f"    {_node(package, source)} --> {_node(package, each)}" for each in sorted(targets - longer)]
        lines.append("  end")
    between = {
        (room(arrow.source), room(arrow.target)) for arrow in imports("pipeline") if arrow.target.startswith("passes")
    }
    for source, target in (("config", "errors"), ("trace", "graph"), ("engine", "tensorrt")):
        assert (source, target) in between
        lines.append(f"  {_node('pipeline', source)} --> {_node('passes', target)}")
    return "\n".join([*lines, "```"])


def _node(package: str, name: str) -> str:
    return f"{package}_{name.strip('_')}[{name}]"


def _reach(below: dict[str, set[str]], start: str) -> set[str]:
    """What can be come to from ``start`` in one step or more."""
    found: set[str] = set()
    waiting = list(below.get(start, ()))
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += below.get(name, ())
    return found


PICTURE = ROOT / "docs" / "architecture.md"


def with_picture(text: str) -> str:
    """``text`` with the picture in its place."""
    before, rest = text.split("```mermaid", 1)
    return before + picture() + rest.split("```", 1)[1]


if __name__ == "__main__":
    PICTURE.write_text(with_picture(PICTURE.read_text(encoding="utf-8")), encoding="utf-8")
