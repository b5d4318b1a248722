"""What a mask can be: one value for each class that can be proved.

A mask is a predicate over (batch b, head h, query q, key k): may query q attend to key k?  With L queries and S keys,
p = q + S - L is the query's place among the keys: q itself without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

Element = tuple[int | str, ...]
"""An index into an input: numbers, and ``"b"`` where it is the row of the batch."""


@dataclass(frozen=True)
class Mask:
    """One class of masks.  ``str`` is its name in a report."""

    name: ClassVar[str]

    @property
    def predicate(self) -> str:
        """What is true where a query attends to a key, in the letters of this module; empty where nothing is known."""
        return ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Absent(Mask):
    """There is no mask."""

    name = "none"


@dataclass(frozen=True)
class Full(Mask):
    """Blocks nothing."""

    name = "full"

    @property
    def predicate(self) -> str:
        return "true"


@dataclass(frozen=True)
class Causal(Mask):
    """Upper-left: torch's ``is_causal``."""

    name = "causal"

    @property
    def predicate(self) -> str:
        return "k <= q"


@dataclass(frozen=True)
class LowerRight(Mask):
    """Causal for queries that are the last of the keys; L differs from S somewhere in the profile."""

    name = "causal_lower_right"

    @property
    def predicate(self) -> str:
        return "k <= p"


@dataclass(frozen=True)
class Placed(Mask):
    """A mask of queries behind a place that comes with the input (a static cache), where q plus that place does not
    overflow.

    The place is ``element`` of the input ``source``; None where it is not one element, or one for each row.
    """

    source: str
    element: Element | None

    @property
    def place(self) -> str:
        """Of query q among the tokens."""
        places = "..." if self.element is None else ", ".join(map(str, self.element))
        return f"q + {self.source}[{places}]" if places else f"q + {self.source}"


@dataclass(frozen=True)
class Offset(Placed):
    """Causal behind a place that comes with the input."""

    name = "causal_offset"

    @property
    def predicate(self) -> str:
        return f"k <= {self.place}"


@dataclass(frozen=True)
class OffsetWindow(Placed):
    """The last ``width`` keys behind a place that comes with the input; blocks some key of the past."""

    width: int
    name = "sliding_window_offset"

    @property
    def predicate(self) -> str:
        return f"k <= {self.place} and {self.place} - k < {self.width}"


@dataclass(frozen=True)
class Ring(Placed):
    """The last ``width`` tokens up to a place that comes with the input, where token n is key n % S: what a cache that
    is written round and round holds of a window."""

    width: int
    name = "ring"

    @property
    def predicate(self) -> str:
        age = f"({self.place} - k) % S"
        return f"{age} <= {self.place} and {age} < {self.width}"


@dataclass(frozen=True)
class Window(Mask):
    """The last ``width`` keys, the query's own included; blocks some key of the past within the profile."""

    width: int
    name = "sliding_window"

    @property
    def predicate(self) -> str:
        return f"k <= p and p - k < {self.width}"


@dataclass(frozen=True)
class Chunked(Mask):
    """The past within the query's own chunk of ``size`` keys; blocks some key of the past within the profile."""

    size: int
    name = "chunked"

    @property
    def predicate(self) -> str:
        return f"k <= p and k // {self.size} == p // {self.size}"


@dataclass(frozen=True)
class Padding(Mask):
    """Causal, and a condition on (b, k) that hangs on run-time inputs."""

    name = "padding"

    @property
    def predicate(self) -> str:
        return "k <= p and mask[b, h, L - 1, k]"


@dataclass(frozen=True)
class Packed(Mask):
    """Causal among places of one segment: ``segment`` names what is made of run-time inputs, whose numbers stay within
    half the range of their type."""

    segment: str
    name = "packed"

    @property
    def predicate(self) -> str:
        return f"k <= p and {self.segment}[b, k] == {self.segment}[b, p]"


@dataclass(frozen=True)
class Bias(Mask):
    """A float mask that could not be proved to hold nothing but 0 and blocked entries."""

    name = "bias"


@dataclass(frozen=True)
class Arbitrary(Mask):
    """None of the others could be proved."""

    name = "arbitrary"


MASKS: tuple[type[Mask], ...] = (
    Absent, Full, Causal, LowerRight, Offset, OffsetWindow, Ring, Window, Chunked, Padding, Packed, Bias, Arbitrary,
)  # fmt: skip
DROPPABLE = (Absent, Full, Causal, LowerRight)
"""Those that need no tensor: what they block is told by the sizes alone."""
