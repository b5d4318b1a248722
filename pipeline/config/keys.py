"""The names of the settings, read from the schema."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from pipeline.config.schema import Config


def schema_keys(prefix: str = "") -> list[str]:
    """The settings of one level of the schema: ``schema_keys("backend")``; empty for what is no group of settings."""
    schema: Any = Config
    for part in filter(None, prefix.split(".")):
        hint = get_type_hints(schema).get(part) if is_dataclass(schema) else None
        schema = next(filter(is_dataclass, (hint, *get_args(hint))), None) if get_origin(hint) is not list else None
    return sorted(f.name for f in fields(schema) if not f.metadata) if is_dataclass(schema) else []
