"""``python -m pipeline.record.schema`` prints the JSON schema of report.json, made from its dataclasses.

It is kept in docs/report.schema.json.  What stands under a field in the source is its description there.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pipeline.record.sections import SCHEMA, Report

PLAIN = {bool: "boolean", int: "integer", str: "string", float: "number"}


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of report.json."""
    made: dict[str, dict[str, Any]] = {}
    _define(Report, made)
    report = made.pop("Report")
    report["properties"]["schema"] = {"const": SCHEMA, **report["properties"]["schema"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"report.json, schema {SCHEMA}",
        **report,
        "$defs": dict(sorted(made.items())),
    }


def _define(kind: type, made: dict[str, dict[str, Any]]) -> None:
    """Have the dataclass ``kind``, and those that its fields hold, in ``made``."""
    if kind.__name__ in made:
        return
    definition = made[kind.__name__] = {
        "description": " ".join((kind.__doc__ or "").split()),
        "type": "object",
        "additionalProperties": False,
        "required": [field.name for field in fields(kind)],
    }
    hints, said = get_type_hints(kind), _descriptions(kind)
    properties = {field.name: _of(hints[field.name], made) for field in fields(kind)}
    for name, description in said.items():
        properties[name] = {"description": description, **properties[name]}
    definition["properties"] = properties


def _of(kind: Any, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (inner,) = (each for each in arguments if each is not NoneType)
        if inner in PLAIN:
            return {"type": [PLAIN[inner], "null"]}
        return {"anyOf": [{"type": "null"}, _of(inner, made)]}
    if is_dataclass(kind) and isinstance(kind, type):
        _define(kind, made)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], made)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _of(arguments[0], made)}
    if origin is tuple:
        return {"type": "array", "prefixItems": [_of(each, made) for each in arguments], "items": False}
    if kind is float:  # a number that is none is null, see pipeline.host.plain_json
        return {"type": ["number", "null"]}
    return {} if kind is Any else {"type": PLAIN[kind]}


def _descriptions(kind: type) -> dict[str, str]:
    """Field -> the text under it, in ``kind`` and the classes it is made from."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not is_dataclass(each):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for before, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(before.target, ast.Name)
                found[before.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2, ensure_ascii=False))
