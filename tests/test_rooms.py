"""The house keeps its shape: who may import whom, no circles, and no module that has grown into a room."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest
from imports import PICTURE, ROOT, imports, modules, room, with_picture

PASSES = ["errors", "private", "precision", "quantised", "proof", "graph", "tensorrt", "front_door", "passes"]
PIPELINE = [
    "host", "private", "config", "model", "trace", "engine", "generate", "rivals", "measure", "verify", "record",
    "store", "tracking", "kept", "deploy", "frame", "run", "compare", "sweep", "__main__", "start", "chat",
]  # fmt: skip
"""From the ground up: a room imports from those before it."""


def test_passes_knows_nothing_of_the_pipeline() -> None:
    assert [arrow for arrow in imports("passes") if arrow.target.startswith("pipeline")] == []


@pytest.mark.parametrize(("package", "rooms"), [("passes", PASSES), ("pipeline", PIPELINE)])
def test_arrows_between_rooms_point_down(package: str, rooms: list[str]) -> None:
    inside = [arrow for arrow in imports(package) if arrow.target.startswith(package)]
    # A package's own module is asked for by nobody but what stands outside; __main__ comes back by its name.
    up = [a for a in inside if rooms.index(room(a.target)) > rooms.index(room(a.source))]
    assert [a for a in up if a.source != "pipeline.__main__"] == [] and inside


@pytest.mark.parametrize("package", ["passes", "pipeline"])
def test_no_module_imports_itself_by_a_detour(package: str) -> None:
    below: dict[str, set[str]] = {}
    for source, target in imports(package):
        if source != "pipeline.__main__" and source != target:
            below.setdefault(source, set()).add(target)
    TopologicalSorter(below).prepare()  # raises where there is a circle


def test_the_lists_of_rooms_are_the_rooms() -> None:
    assert {room(name) for name in modules("passes")} == set(PASSES)
    assert {room(name) for name in modules("pipeline")} == {*PIPELINE, "pipeline"}


def test_pipeline_has_at_most_six_modules_at_its_top_and_no_module_is_over_300_lines() -> None:
    top = sorted(path.stem for path in (ROOT / "pipeline").glob("*.py"))
    assert top == ["__init__", "__main__", "chat", "frame", "run", "start"]
    every = modules("passes") | modules("pipeline")
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in every.items()}
    assert {name: count for name, count in lines.items() if count > 300} == {}


STAGES = ("trace", "engine", "generate", "rivals", "measure", "verify", "store.reuse")
RECORDERS = {"Record", "StageDisplay", "Config"}


def test_no_stage_takes_the_record_the_display_or_the_whole_configuration() -> None:
    """They take values, and return one; ``pipeline/run.py`` alone records."""
    every = modules("pipeline").items()
    taken = {
        f"{module}: {function.name}({argument.arg})"
        for module, path in every
        if module.removeprefix("pipeline.").startswith(STAGES)
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for argument in [*function.args.args, *function.args.kwonlyargs]
        if argument.annotation and RECORDERS & {n.id for n in ast.walk(argument.annotation) if isinstance(n, ast.Name)}
    }
    assert taken == set()


def test_every_module_says_what_it_is_about_in_one_line() -> None:
    for name, path in (modules("passes") | modules("pipeline")).items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        assert first.startswith('"""') and len(first) > 20, f"{name}: {first}"


def test_the_picture_of_the_house_is_made_of_the_imports() -> None:
    """``python tests/imports.py`` writes it."""
    text = PICTURE.read_text(encoding="utf-8")
    assert text == with_picture(text)
