"""Rows that belong side by side, and the shortest names that tell them apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.compare.rows import Measure, Row

VERSIONS = ("flavour", "tensorrt", "torch", "torch_tensorrt", "transformers", "driver", "git")
CACHES = {"none": "no cache", "in_engine": "cache in the engine"}
NAMES = {
    "gpu": "", "flavour": "", "tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT",
    "torch_tensorrt": "Torch-TensorRT", "python": "Python",
}  # fmt: skip
"""Of what has a version, and of a TensorRT's flavour."""
SAID = (
    "precision", "shape.kind", "shape.batch", "shape.min", "shape.opt", "shape.max", "cache.name", "model.inputs",
    "strategy.name", "backend.name", "model.name", "model.weights",
)  # fmt: skip
"""Settings that :data:`WORDS`, a row's ``how`` or its section's title put into words of their own."""


def cache(row: Row) -> str:
    name = row.axes.get("cache.name", "none")
    return CACHES.get(name, f"{name} cache")


def _kind(row: Row) -> str:
    return "any length" if row.axes.get("shape.kind") == "dynamic" else "one length"


def _lengths(row: Row) -> str:
    least, most = row.axes.get("shape.min", "?"), row.axes.get("shape.max", "?")
    if row.axes.get("shape.kind") != "dynamic":
        return f"{most} tokens"
    return f"up to {most} tokens" if least in ("1", "2") else f"{least} to {most} tokens"


WORDS: dict[str, Callable[[Row], str]] = {
    "precision": lambda row: row.axes.get("precision", ""),
    "cache": cache,
    "kind": _kind,
    "batch": lambda row: f"batch {row.axes.get('shape.batch', '1')}",
    "lengths": _lengths,
    "inputs": lambda row: f"inputs {row.axes.get('model.inputs', '').strip('[]').replace(',', ', ')}",
}
"""How rows differ, in words; what matters more to a reader comes first."""


@dataclass(frozen=True)
class Section:
    """The rows of one model on one GPU: those whose times may be compared."""

    model: str
    gpu: str | None
    rows: list[Row]

    @property
    def title(self) -> str:
        return f"{self.model} on {self.gpu}" if self.gpu else f"{self.model}, no GPU"

    @property
    def measures(self) -> list[Measure]:
        """What was timed, whole before its parts."""
        order = {"device_ms": 0, "ttft_ms": 1, "tpot_ms": 2}
        found = {measure for row in self.rows for measure in row.timings}
        return sorted(found, key=lambda m: (m.kind != "generate", m[1:4], order[m.clock]))

    def timed(self, measure: Measure) -> list[Row]:
        """The rows that have ``measure``, fastest first."""
        rows = [row for row in self.rows if measure in row.timings]
        return sorted(rows, key=lambda row: row.timings[measure].time.median)

    @property
    def without(self) -> list[Row]:
        """The rows that have no time."""
        return [row for row in self.rows if not row.timings]

    @property
    def unsupported(self) -> bool:
        return any(not row.supported for row in self.rows)


def sections(rows: list[Row]) -> list[Section]:
    """``rows`` by model and GPU (none last), labelled; the fastest first in each, those without a time last.

    What failed or is unavailable before any GPU was asked stands with the model's other rows, where there are some.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.model, row.gpu or ""].append(row)
    for model in {model for model, gpu in groups if not gpu}:
        if with_gpu := [key for key in sorted(groups) if key[0] == model and key[1]]:
            nowhere = [row for row in groups[model, ""] if row.status in ("failed", "unavailable")]
            groups[with_gpu[0]] += nowhere
            groups[model, ""] = [row for row in groups[model, ""] if not any(row is other for other in nowhere)]
    made = []
    for (model, gpu), members in sorted(groups.items(), key=lambda item: (not item[0][1], item[0])):
        if not members:
            continue
        label(members)
        section = Section(model, gpu or None, members)
        headline = section.measures[:1]
        members.sort(key=lambda row: (min([row.timings[m].time.median for m in headline if m in row.timings] or
                                          [float("inf")]), row.status, _natural(row.label)))  # fmt: skip
        made.append(section)
    return made


def _natural(text: str) -> list[tuple[int, str]]:
    """A key by which 512 comes before 2048."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def label(rows: list[Row]) -> None:
    """Give each row the name that tells it from the others here."""
    for row, name in zip(rows, names(rows), strict=True):
        row.label = name


def names(rows: Sequence[Row], ignored: Sequence[str] = ()) -> list[str]:
    """The name of each row: its strategy or rival, its cache where there are several kinds, then, only where rows would
    still be called alike, how they differ: in :data:`WORDS`, in other settings, in versions, and at last in the order
    of their files.

    ``ignored``: words and settings in which rows that are alike may differ.
    """
    called = [row.how for row in rows]
    if len({cache(row) for row in rows}) > 1:  # said also where the name would do without: it explains the most
        said = ["" if cache(row) == "no cache" else f", {cache(row)}" for row in rows]
        called = [name + more for name, more in zip(called, said, strict=True)]
    for text in _differences(rows, ignored):
        for alike in _alike(called):
            said = [text(rows[i]) for i in alike]
            if len(set(said)) > 1:
                for i, more in zip(alike, said, strict=True):
                    called[i] += f", {more}" if more else ""
    for alike in _alike(called):
        if not ignored:
            for number, i in enumerate(sorted(alike, key=lambda i: rows[i].name), 1):
                called[i] += f", run {number}"
    return called


def _differences(rows: Sequence[Row], ignored: Sequence[str]) -> Iterator[Callable[[Row], str]]:
    yield from (text for name, text in WORDS.items() if name not in ignored)
    others = sorted({key for row in rows for key in row.axes if not key.startswith((*SAID, *ignored))})
    for key in others:
        if len({row.axes.get(key) for row in rows}) > 1:
            words = key.rpartition(".")[2].replace("_", " ")
            yield lambda row, key=key, words=words: f"{words} {row.axes.get(key, 'not set')}"  # type: ignore[misc]
    if not ignored:
        for key in VERSIONS:
            words = key.replace("_", " ")
            yield lambda row, key=key, words=words: f"{words} {version(row, key)}"  # type: ignore[misc]


def shared(rows: Sequence[Row]) -> list[str]:
    """What all of ``rows`` have in common and a title should say; that no cache is used is not worth a word."""
    said = [{WORDS[name](row) for row in rows} for name in ("precision", "cache", "kind")]
    return [text for each in said if len(each) == 1 for text in each if text not in ("", "no cache")]


def version(row: Row, key: str) -> str:
    """A version as a person reads it: of a git revision its first seven characters."""
    text = str(row.environment.get(key))
    if key == "git":
        revision, _, dirty = text.partition("-")
        return revision[:7] + (" with changes" if dirty else "")
    if key == "gpu" and not row.supported:
        return f"{text} (not supported by the vendor)"
    return NAMES.get(text, text)


def versions(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """What ran, and every version of it that is here: one, where nothing but the settings differs."""
    found = []
    for key in ("gpu", "compute_capability", *VERSIONS, "python"):
        texts = {version(row, key) for row in rows if row.environment.get(key)}
        if key == "git":  # each once: that one run had changes says it of all
            texts -= {text.removesuffix(" with changes") for text in texts if text.endswith(" with changes")}
        if texts:
            found.append((NAMES.get(key, key.replace("_", " ")), sorted(texts)))
    return found


def _alike(called: Sequence[str]) -> list[list[int]]:
    """Places of those that are called the same."""
    places: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(called):
        places[name].append(i)
    return [group for group in places.values() if len(group) > 1]
