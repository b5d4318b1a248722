"""The settings that make one row of a comparison another than the next, and the grammar that names some of them.

``AXIS:VALUE``, several with commas between: ``strategy:upstream``, ``backend:eager,cache:none``,
``backend.fused_rows:false``, ``model.inputs:[input_ids,last]``.  Values are read as the command line reads those of
settings: ``True`` is ``true``, ``4`` is ``4.0``, ``null`` is a setting that is unset, and quotes make anything text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from passes.errors import UserError
from passes.precision import FEW_BITS
from pipeline.config.overrides import split

GROUPS = ("model", "precision", "quantize", "strategy", "backend", "shape", "cache")
"""What a report's ``config`` calls them."""
NO_AXES = ("model.source", "model.revision", "model.architecture", "model.path")  # the model's name stands for them
SHORT = {"model": "model.name", "strategy": "strategy.name", "backend": "backend.name", "cache": "cache.name",
         "shape": "shape.kind"}  # fmt: skip
Axes = dict[str, str]
USUAL = {"quantize.calibration.samples": "16", "quantize.calibration.length": "512"}
"""What a run has that asks for nothing else, written as an axis: no row is told from another by it."""


def axes(config: Mapping[str, Any]) -> Axes:
    """The settings of a config that tell rows apart, dotted, as the command line writes them.

    Unset ones are left out, and so is what has no part in the run: a rival's strategy, a guard without an assumption,
    how weights are made smaller that are not.
    """
    found = {key: _written(value) for key, value in settings(config) if value not in (None, [], {})}
    model = config.get("model") or {}
    if model.get("path"):
        found["model.name"] = Path(model["path"]).name
    if found.get("backend.name", "tensorrt") != "tensorrt":
        found = {key: value for key, value in found.items() if not key.startswith("strategy.")}
    few_bits = found.get("precision") in FEW_BITS
    found = {k: v for k, v in found.items() if not k.startswith("quantize.") or (few_bits and v != USUAL.get(k))}
    if "strategy.assume" not in found:
        found.pop("strategy.guard", None)
    return found


def settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting of a config that can be an axis, unset ones too."""
    for group in GROUPS:
        value = config.get(group)
        if not isinstance(value, Mapping):
            yield group, value
            continue
        yield from ((key, each) for key, each in _dotted(value, group) if key not in NO_AXES)


def _dotted(group: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """What stands in a group, and in groups within it."""
    for key, setting in group.items():
        full = f"{name}.{key}"
        yield from _dotted(setting, full) if isinstance(setting, Mapping) and full not in NO_AXES else [(full, setting)]


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(_written, value))}]" if isinstance(value, list) else str(value)


def parse(text: str, option: str, axis: str, rows: Sequence[Axes], unset: set[str], one: str) -> Axes:
    """What ``text`` names, as axes that at least one of ``rows`` has; raises :class:`UserError` in one line.

    ``option`` is what it was given with, ``axis`` what is called an axis there, and ``one`` what is called a row.
    ``unset``: axes that a row may lack, and then are null.
    """
    wanted: Axes = {}
    refusal = f"{option}{text}"
    known = {key for row in rows for key in row} | unset
    for part in split(text):
        name, colon, value = (each.strip() for each in part.partition(":"))
        if not colon or not name or not value:
            raise UserError(f"{refusal}: is written {axis.upper()}:VALUE, for example strategy:upstream")
        key = SHORT.get(name, name)
        if key not in known:
            names = sorted(known - set(SHORT.values()) | {short for short, full in SHORT.items() if full in known})
            raise UserError(f"{refusal}: no {axis} {name}; these {one}s have {', '.join(names)}")
        if not any(_is(row.get(key), value) for row in rows):
            values = sorted({row[key] for row in rows if key in row}) or ["null"]
            raise UserError(f"{refusal}: no {one} has it; {name} here is {', '.join(values)}")
        wanted[key] = value
    if not any(has(row, wanted) for row in rows):
        raise UserError(f"{refusal}: no {one} has all of it together")
    return wanted


def has(row: Axes, wanted: Axes) -> bool:
    """Whether ``row`` is one of those that ``wanted``, from :func:`parse`, names."""
    return all(_is(row.get(key), value) for key, value in wanted.items())


def _is(setting: str | None, value: str) -> bool:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return setting == value[1:-1]
    meant = _meaning(value)
    return meant in (None, ()) if setting is None else type(_meaning(setting)) is type(meant) and _meaning(
        setting) == meant  # fmt: skip


WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}


def _meaning(text: str) -> Any:
    """The value that ``text`` is for the command line: true, a number, a list, null, else itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if text.startswith("[") and text.endswith("]"):
        return tuple(_meaning(part.strip("'\"")) for part in split(text[1:-1]) if part)
    convert: Callable[[str], Any]
    for convert in (int, float):
        try:
            return float(convert(text))
        except ValueError:
            continue
    return text
