"""What a GGUF file says of itself: its metadata and where its tensors lie, without reading them.

Little-endian files of versions 2 and 3, as ggml's ``docs/gguf.md`` defines them.  The vocabulary is stepped over: a
library that reads it takes a quarter of a minute for Gemma's.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIX = ".gguf"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """A tensor of the file."""

    shape: tuple[int, ...]
    """As torch has it: ggml writes the innermost dimension first."""
    type: int
    """Of ggml: 0 is float32, 1 float16, 2 Q4_0 …"""
    offset: int
    """Bytes from the beginning of the file."""


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    """An array of texts, such as the vocabulary, stands as its length."""
    tensors: dict[str, Stored]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def own(self) -> dict[str, Any]:
        """What it says of its architecture, without that in front: ``context_length``."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}


def alone(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or the only one of a folder without config.json; None for anything else."""
    if path.is_file() and path.suffix == SUFFIX:
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = list(path.glob(f"*{SUFFIX}"))
    return found[0] if len(found) == 1 else None


def read(path: Path) -> Header:
    """Raises :class:`OSError`, and :class:`ValueError` for what is no whole header of a GGUF file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(data).header()
        except (struct.error, OverflowError, KeyError, UnicodeDecodeError):
            raise ValueError("its header is damaged or cut off") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 0

    def header(self) -> Header:
        magic, version = self.data[:4], self.take("4xI")[0]
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it is no GGUF file of version 2 or 3")
        tensors, pairs = self.take("QQ")
        metadata = {self.text(): self.value(*self.take("I")) for _ in range(pairs)}
        listed = {self.text(): self.tensor() for _ in range(tensors)}
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.place // alignment) * alignment
        stored = {name: Stored(shape, kind, start + offset) for name, (shape, kind, offset) in listed.items()}
        return Header(metadata, stored)

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        return str(self.take(f"{length}s")[0].decode())

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.take(_NUMBERS[kind])[0]
        inner, count = self.take("IQ")
        if inner != _TEXT:
            return list(self.take(f"{count}{_NUMBERS[inner]}"))
        for _ in range(count):
            (length,) = self.take("Q")
            self.place += length
        return count

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        (dimensions,) = self.take("I")
        shape = self.take(f"{dimensions}Q")
        kind, offset = self.take("IQ")
        return tuple(reversed(shape)), kind, offset
