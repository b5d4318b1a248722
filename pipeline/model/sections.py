"""What the report says of the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """The model that was loaded, and where it came from."""

    name: str
    source: str
    """Repository, package or folder of the weights; for random weights what was drawn for."""
    revision: str | None
    """Version or commit that was loaded."""
    sha256: str | None
    """Of the weights' file or files; null for random weights."""
    parameters: int
    """Number of parameters; tied ones count once."""
    weights: str
    """``pretrained`` or ``random``."""
