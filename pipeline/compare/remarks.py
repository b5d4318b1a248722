"""What speaks against a row, or must be known of it: a word beside the row, and what it means at the page's end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.compare.rows import Row, Timing

LONGEST = 48
"""Letters of a remark that is its own word."""


@dataclass(frozen=True)
class Remark:
    word: str
    means: str
    warns: bool = False
    """Whether the time beside it is to be doubted, more than those of its neighbours."""


HELD_BACK = Remark(
    "power-limited",
    "The card's power limit held its clocks back, for the share of the measurement that is given. A card that runs hot "
    "loads does this to every row; on a card with a higher limit all of them are faster.",
)
KNOWN: tuple[tuple[str, Remark], ...] = (  # what pipeline.measure and pipeline.host.gpu write, and what it comes to
    (r"clocks held back by (software power cap|the power limit)", HELD_BACK),
    (r"clocks held back by", Remark("clocks held back", "Heat or a fault held the card's clocks back.", True)),
    (r"host_ms drifted", Remark("host drifted", "The host's times differed between the halves of the measurement; "
                                "those of the device, which are compared, did not.")),
    (r"\w+ drifted", Remark("drifted", "The device's times differed between the halves of the measurement.", True)),
    (r"warm-up did not settle", Remark("not settled", "The times still fell when the longest warm-up was over.", True)),
    (r"\d+ other process", Remark("shared card", "Other processes ran on the card.", True)),
    (r"state of the GPU not known", Remark("card not watched", "Whether the card's clocks were held back, or others "
                                           "used it, is not known.", True)),
)  # fmt: skip


def of_taint(text: str) -> Remark:
    return next((remark for pattern, remark in KNOWN if re.match(pattern, text)), Remark(_short(text), text, True))


def of_note(text: str) -> Remark | None:
    """None for what the names of the rows say already."""
    return None if re.match(r"backend=\w+ runs the model as it is", text) else Remark(_short(text), text)


def warns(timing: Timing) -> bool:
    return any(of_taint(text).warns for text in timing.tainted)


def said_of_all(rows: Sequence[Row], timings: Sequence[Timing]) -> list[Remark]:
    """The warnings that every one of ``timings`` has: said once above them, a sign at each would say nothing."""
    everywhere = [{remark for remark in map(of_taint, timing.tainted) if remark.warns} for timing in timings]
    return sorted(set.intersection(*everywhere), key=lambda each: each.word) if len(everywhere) > 1 else []


def _short(text: str) -> str:
    """The first clause, not in the middle of a word."""
    clause = re.split(r"[:;(]", text)[0].strip() or text
    return clause if len(clause) <= LONGEST else clause[:LONGEST].rsplit(" ", 1)[0] + " …"


class Remarks:
    """The remarks of a table, each explained once."""

    def __init__(self) -> None:
        self._found: dict[str, Remark] = {}

    def words(self, taints: Iterable[str], notes: Iterable[str]) -> str:
        """What stands in a row's cell: the words, with the largest share of the time that they hold for."""
        shares: dict[str, list[int]] = {}
        for text in taints:
            shares.setdefault(self._word(of_taint(text)), []).extend(map(int, re.findall(r"(\d+)%", text)))
        for remark in filter(None, map(of_note, notes)):
            shares.setdefault(self._word(remark), [])
        return ", ".join(f"{word} {max(each)} %" if each else word for word, each in shares.items())

    def _word(self, remark: Remark) -> str:
        if self._found.setdefault(remark.word, remark).means == remark.means or remark.word == remark.means:
            return remark.word
        # Two notes that begin alike: the second is its own word, whole.
        return self._word(Remark(remark.means, remark.means, remark.warns))

    def __iter__(self) -> Iterator[Remark]:
        return iter(self._found.values())

    def texts(self) -> list[str]:
        return [_explained(remark) for remark in self._found.values()]


def _explained(remark: Remark) -> str:
    return remark.means if remark.word == remark.means else f"{remark.word}: {remark.means}"


NAMES: tuple[tuple[str, str], ...] = (
    ("detect_causal", "TensorRT; at conversion a mask that is proved causal becomes the causal flag of the native "
     "attention layer"),
    ("lowering", "TensorRT; the same in the graph, before conversion: the mask's own operations are deleted"),
    ("mask_input", "TensorRT; the native attention layer, always with the mask as an input"),
    ("decompose", "TensorRT; attention as matrix products and a softmax, without the native layer"),
    ("upstream", "TensorRT; what the installed Torch-TensorRT does by itself"),
    ("PyTorch eager", "the model as it is, in PyTorch"),
    ("torch.compile", "the model as it is, compiled by PyTorch"),
    ("attention plugin", "TensorRT with an attention plugin in place of the native layer"),
    ("no cache", "each new token goes through the model with all tokens before it"),
    ("static cache", "keys and values in buffers of a fixed capacity, handed in and out at each token"),
    ("dynamic cache", "keys and values in buffers that grow with each token"),
    ("cache in the engine", "keys and values in TensorRT's own cache layer, updated in place"),
    ("one length", "built for prompts of one length"),
    ("any length", "built for prompts of every length up to the longest"),
)  # fmt: skip
"""What a row's name is made of, and what it stands for."""


def glossary(labels: Iterable[str]) -> list[tuple[str, str]]:
    """Those of :data:`NAMES` that occur in ``labels``."""
    text = "\n".join(labels)
    return [(name, means) for name, means in NAMES if re.search(rf"\b{re.escape(name)}\b", text)]
