"""Lengths that nobody gave: they follow the model, and each other.

A default of ``conf/`` that is written ``2048 or less`` is 2048 where the model has positions for as many and what was
given leaves room for them, else as much as there is room for.  A plain number, whoever wrote it, is never changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.schema import CacheConfig, GenerateShape, ShapeConfig
from pipeline.host import gguf_header

POSITIONS = ("max_position_embeddings", "n_positions")
"""What a config.json calls the longest sequence in tokens; the second is GPT-2's, and transformers maps it."""

GENERATED = {"input_length": 1920, "output_length": 128}
"""``benchmark.generate`` where it leaves them out; both fit ``shape.max=2048``."""

GRANULE = 128
"""Capacities of a cache, and chunks of a prompt, are multiples of it (tokens), so that a channel's values, which lie
side by side, begin at addresses that suit wide loads."""

SHARE = 16
"""Of the room for a generation, one part in so many is for new tokens: 128 of 2048."""


def positions(path: str | None, architecture: Mapping[str, Any]) -> int | None:
    """The model's longest sequence in tokens; None where neither its folder or file nor its architecture says."""
    described: Any = dict(architecture)
    if path is not None:
        try:
            where = Path(path).expanduser()
            if (file := gguf_header.alone(where)) is not None:
                return gguf_header.read(file).own().get("context_length")
            described = json.loads((where / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RuntimeError):  # the load stage says what is wrong with it
            return None
    parts = [described, described.get("text_config")] if isinstance(described, dict) else []
    found = [part.get(key) for part in parts if isinstance(part, Mapping) for key in POSITIONS]
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def longest_sequence(shape: ShapeConfig, generate: GenerateShape | None) -> int:
    """Tokens that a run's KV cache must hold where its capacity is left open: the generation that is asked for, and
    at least one token behind the longest prompt."""
    longest = generate.input_length + generate.output_length if generate else shape.max + GRANULE
    return max(longest, shape.max + 1)


def capacity_of(cache: CacheConfig, longest: int) -> int:
    """Tokens that ``cache`` has room for: a whole number of chunks, or of granules."""
    return in_granules(cache.capacity or longest, cache.chunk or GRANULE)


def in_granules(places: int, granule: int = GRANULE) -> int:
    """At least ``places``, a multiple of ``granule``."""
    return -(-places // granule) * granule


def settle(settings: DictConfig) -> tuple[str, ...]:
    """Put a number wherever the unresolved ``settings`` have an ``N or less``; returns what must be said about it."""
    changed: dict[str, int] = {}
    causes: dict[str, None] = {}

    def put(key: str, wanted: int, length: int, cause: str | None) -> None:
        OmegaConf.update(settings, key, length, merge=False)
        if length < wanted:
            changed[key] = length
            if cause is not None and cause.partition("=")[0] not in changed:
                causes[cause] = None

    bounds = _bounds(settings)
    if wanted := _or_less(_value(settings, "shape.max")):
        bound, cause = _least(bounds, wanted)
        put("shape.max", wanted, int(bound), cause)
    longest = _number(_value(settings, "shape.max"))
    for item in _value(settings, "benchmark.shapes") or []:
        if isinstance(item, DictConfig) and "input_length" not in item:
            item["input_length"] = "${shape.max}"
    generate = _value(settings, "benchmark.generate")
    if isinstance(generate, DictConfig) and longest is not None:
        asked = {key: generate.get(key, f"{default} or less") for key, default in GENERATED.items()}
        wanted_in, wanted_out = (_or_less(asked[key]) for key in GENERATED)
        given_in, new = (_number(asked[key]) for key in GENERATED)
        if _value(settings, "cache.name") == "none":  # then every length on the way runs as a prompt
            bounds[f"shape.max={longest}"] = longest + 1
        total = (wanted_in or given_in or 0) + (wanted_out or new or 0)
        room, cause = _least(bounds, total)
        if wanted_out:
            least = room - given_in if given_in is not None else room // SHARE if room < total else wanted_out
            new = int(min(wanted_out, max(2, least)))
            put("benchmark.generate.output_length", wanted_out, new, cause)
        if wanted_in and new is not None:
            prompt, tighter = _least({f"shape.max={longest}": longest}, min(wanted_in, room - new))
            put("benchmark.generate.input_length", wanted_in, max(1, int(prompt)), tighter or cause)
    if not changed:
        return ()
    lengths = ", ".join(f"{key}={length}" for key, length in changed.items())
    return (f"{lengths}: not given, so {'it follows' if len(changed) == 1 else 'they follow'} {', '.join(causes)}",)


def _bounds(settings: DictConfig) -> dict[str, float]:
    """What bounds every length -> the bound."""
    architecture, path = _value(settings, "model.architecture"), _value(settings, "model.path")
    limit = positions(
        str(path) if path is not None else None, architecture if isinstance(architecture, DictConfig) else {}
    )
    bounds: dict[str, float] = {} if limit is None else {f"the model's max_position_embeddings={limit}": limit}
    if _value(settings, "cache.name") in ("static", "in_engine"):
        capacity = _number(_value(settings, "cache.capacity"))
        bounds |= {} if capacity is None else {f"cache.capacity={capacity}": capacity}
    return bounds


def _least(bounds: Mapping[str, float], unless: float) -> tuple[float, str | None]:
    """The smallest of ``bounds`` and its name; ``unless`` and None where none of them is smaller."""
    name = min(bounds, key=lambda each: bounds[each], default=None)
    return (unless, None) if name is None or bounds[name] >= unless else (bounds[name], name)


def _value(settings: DictConfig, key: str) -> Any:
    """What stands under a dotted key, interpolations resolved; None where nothing can be had."""
    try:
        return OmegaConf.select(settings, key)
    except OmegaConfBaseException:
        return None


def _or_less(value: Any) -> int | None:
    found = re.fullmatch(r"(\d+) or less", value) if isinstance(value, str) else None
    return int(found[1]) if found else None


def _number(value: Any) -> int | None:
    return int(value) if str(value).isdecimal() else None
