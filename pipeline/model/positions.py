"""How long a text a model has positions for."""

from __future__ import annotations

from typing import Any

NO_LIMIT = -1
"""What the config of XLNet says, whose positions are distances."""


def positions_of(config: Any) -> int | None:
    """The longest sequence in tokens, as the text's own part of ``config`` says; None where there is no limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if found == NO_LIMIT else found
