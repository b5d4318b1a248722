"""Every way in which a decoder of transformers is called, each exported and with the inputs that tell masks apart.

Lengths are small enough to try every one: up to :data:`LONGEST` keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel, StaticCache

from passes.graph.prepare import prepare
from passes.tensorrt.versions import quiet

LONGEST = 12
"""Keys that a query may see at most; also the capacity of the static cache."""
BATCH = 8
"""Rows of a batch: each brings contents of its own, so that one run of a mask's graph tries several."""


@dataclass(frozen=True)
class CallForm:
    """One row of inputs that a model is called with."""

    name: str
    inputs: tuple[str, ...] = ("input_ids",)
    cache: str = "none"
    """``none`` (``use_cache=False``), ``dynamic`` (the past comes in as tensors) or ``static`` (buffers, mutated)."""
    decode: bool = False
    """One query only."""

    @property
    def shapes(self) -> tuple[str, ...]:
        """What it is traced with: decoding with a static cache has no dynamic size."""
        return ("static",) if self.decode and self.cache == "static" else ("static", "dynamic")

    def example(self, shape: str) -> tuple[int, int]:
        """(queries, keys in the cache before them) to trace with: no bound of the profile, lest it be specialised."""
        if self.cache == "dynamic":
            return (1, 7) if self.decode else (3, 5)
        return (1 if self.decode else 8 if shape == "static" else 11, 0)

    def sizes(self, shape: str) -> list[tuple[int, int]]:
        """Every (queries, keys in the cache before them) to try.

        A static cache is a state: a graph that is static otherwise still meets every position in it.
        """
        example = self.example(shape)
        past = {"none": range(1), "dynamic": range(1, LONGEST), "static": range(LONGEST)}[self.cache]
        queries = range(1, LONGEST + 1)
        if self.decode or shape == "static":
            queries = range(example[0], example[0] + 1)
        if shape == "static" and self.cache == "dynamic":
            past = range(example[1], example[1] + 1)
        return [pair for pair in itertools.product(queries, past) if sum(pair) <= LONGEST]


IDS, POSITIONS, PADDED = "input_ids", "position_ids", "attention_mask"
FORMS = (
    CallForm("ids"),
    CallForm("position_ids", (IDS, POSITIONS)),
    CallForm("attention_mask", (IDS, PADDED)),
    CallForm("both", (IDS, PADDED, POSITIONS)),
    CallForm("4-D mask", (IDS, "mask_4d")),
    CallForm("dynamic cache, chunk", cache="dynamic"),
    CallForm("dynamic cache, chunk, attention_mask", (IDS, PADDED), "dynamic"),
    CallForm("dynamic cache, decode", cache="dynamic", decode=True),
    CallForm("dynamic cache, decode, attention_mask", (IDS, PADDED), "dynamic", True),
    CallForm("static cache, prefill", cache="static"),
    CallForm("static cache, prefill, attention_mask", (IDS, PADDED), "static"),
    CallForm("static cache, decode", cache="static", decode=True),
    CallForm("static cache, decode, attention_mask", (IDS, PADDED), "static", True),
)


class _Called(nn.Module):
    """The model as a form calls it; returns logits [batch, queries, vocabulary]."""

    def __init__(self, model: PreTrainedModel, form: CallForm) -> None:
        super().__init__()
        self.model, self.form = model, form
        if form.cache == "static":
            self.cache = StaticCache(config=model.config, max_cache_len=LONGEST)
            for index, (key, value) in enumerate(_cached(model, 2)):
                layer = self.cache.layers[index]
                layer.lazy_initialization(key, value)
                for name in ("keys", "values", "cumulative_length"):
                    self.register_buffer(f"{name}_{index}", getattr(layer, name), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        mask_4d: Tensor | None = None,
        past: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        given: dict[str, Any] = {"use_cache": False}
        if self.form.cache == "static":
            given = {"use_cache": True, "cache": self.cache}
        if past is not None:
            cache = DynamicCache(config=self.model.config)
            for index, (key, value) in enumerate(past):
                cache.update(key, value, index)
            given = {"use_cache": True, "cache": cache}
        mask = attention_mask if mask_4d is None else mask_4d
        if mask is not None:
            given["attention_mask"] = mask
        if position_ids is not None:
            given["position_ids"] = position_ids
        return self.model(input_ids=input_ids, **given).logits


def _cached(model: PreTrainedModel, length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [batch, heads, length, head size] of each layer, as the model itself makes them.

    All of them, of windowed layers too: the cache that the traced call fills with them knows what it keeps.
    """
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.ones(BATCH, length, dtype=torch.int64), cache=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def export(model: PreTrainedModel, form: CallForm, shape: str) -> ExportedProgram:
    """``model`` called as ``form`` says, exported and prepared as the pipeline does; raises what export raises."""
    queries, past = form.example(shape)
    example = next(contents(form, queries, past, 1))
    if form.cache == "dynamic":
        example["past"] = _cached(model, past)
    dynamic = None
    if shape == "dynamic":
        dynamic = {name: _dynamic(name, form, len(example.get("past", ()))) for name in example}
    with torch.no_grad(), quiet():
        program = torch.export.export(
            _Called(model, form),
            (),
            example,
            dynamic_shapes=dynamic,
            strict=form.cache == "static",  # otherwise the cache's position would become a constant
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        return prepare(program)


def _dynamic(name: str, form: CallForm, layers: int) -> Any:
    """The dynamic sizes of one input; the sum of two others, which no ``Dim`` can say, is left to torch.export."""
    queries = Dim("queries", min=1, max=LONGEST)
    past = Dim("past", min=1, max=LONGEST - 1)
    if name == "past":
        return [({2: past}, {2: past})] * layers
    if name == "mask_4d":
        return {2: queries, 3: queries}
    if name == PADDED and form.cache == "dynamic":
        return {1: past + 1 if form.decode else Dim.AUTO}
    if form.decode or (name == PADDED and form.cache == "static"):
        return {}
    return {1: queries}


def contents(form: CallForm, queries: int, past: int, most: int = 1000) -> Iterator[dict[str, Any]]:
    """At most ``most`` sets of inputs, without the cache; the first has no padding and contiguous positions."""
    keys = LONGEST if form.cache == "static" else past + queries
    masks = _batches(_attention_masks(keys)) if PADDED in form.inputs else [None]
    positions = _batches(_positions(queries)) if POSITIONS in form.inputs else [None]
    longest = max(len(masks), len(positions))
    for turn in range(min(most, longest if 1 in (len(masks), len(positions)) else 2 * longest)):
        made: dict[str, Any] = {IDS: torch.ones(BATCH, queries, dtype=torch.int64)}
        if PADDED in form.inputs:
            made[PADDED] = masks[turn % len(masks)]
        if POSITIONS in form.inputs:
            made[POSITIONS] = positions[(turn + turn // longest) % len(positions)]
        if "mask_4d" in form.inputs:
            made["mask_4d"] = torch.rand(BATCH, 1, queries, keys, generator=_generator(queries)) > 0.3
        yield made


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _batches(rows: list[Tensor]) -> list[Tensor]:
    """The first row for a whole batch, then all of them, ``BATCH`` at a time."""
    rows = rows + [rows[0]] * (-len(rows) % BATCH)
    stacked = [torch.stack([rows[0]] * BATCH)]
    return stacked + [torch.stack(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


def _attention_masks(length: int) -> list[Tensor]:
    """int64 [length]: no padding, then every content up to length 4, else each padding left, right and inside."""
    if length <= 4:
        rows = [torch.tensor(bits) for bits in itertools.product((1, 0), repeat=length)]
    else:
        at = torch.arange(length)
        rows = [torch.ones(length, dtype=torch.int64)]
        rows += [(at >= left).long() for left in range(1, length + 1)]
        rows += [(at < right).long() for right in range(1, length)]
        rows += [(at != hole).long() for hole in range(1, length - 1)]
        rows += list(torch.randint(0, 2, (8, length), generator=_generator(length)))
    return [row.to(torch.int64) for row in rows]


def _positions(length: int) -> list[Tensor]:
    """int64 [length]: contiguous, then shifted, restarting at each token and at two, repeated, reversed, any."""
    at = torch.arange(length)
    rows = [at, at + 3, at * 0, at.flip(0), at * 2]
    rows += [torch.where(at < start, at, at - start) for start in range(1, length)]
    rows += [torch.where(at < start, at, at + 1) for start in range(1, length)]
    rows += [(at - left).clamp(min=0) for left in range(1, length)]
    rows += [at % 3, torch.where(at < length // 2, at, (at - length // 2) % 3)]
    rows += list(torch.randint(0, length + 1, (6, length), generator=_generator(length)))
    return rows
