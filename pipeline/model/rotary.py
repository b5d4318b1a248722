"""Where a model turns its positions otherwise once a text is long enough (longrope: Phi-3 and Phi-4 with 128k)."""

from __future__ import annotations

from typing import Any

from passes.errors import UserError


def turn_of(config: Any) -> int | None:
    """The tokens up to which rotary positions have their short factors, all of them, and above which their long ones;
    None where there is one set.

    transformers chooses by the longest row: ``transformers.modeling_rope_utils.longrope_frequency_update``.  The choice
    is in the traced program, made anew at every length.  But keys in a cache stay as they were turned, so a sequence
    must not cross: transformers' ``generate`` runs all of it anew there
    (``Phi3ForCausalLM.prepare_inputs_for_generation``).
    """
    described = config.get_text_config()
    said = getattr(described, "rope_parameters", None) or {}
    each = [said] if "rope_type" in said else [part for part in said.values() if isinstance(part, dict)]
    turns = [part["original_max_position_embeddings"] for part in each if part.get("rope_type") == "longrope"]
    return min(turns, default=None)


def check_crossing(turn: int | None, length: int, total: int, setting: str) -> None:
    """Raises :class:`UserError`, which begins with ``setting``, where ``total`` tokens lie beyond ``turn`` and the
    prompt of ``length`` does not."""
    if turn is not None and length <= turn < total:
        raise UserError(
            f"{setting}: a prompt of {length} tokens that becomes {total} crosses {turn}, where the model turns all "
            f"positions anew and the KV cache would not; stop at {turn}, or begin with a prompt of at least {turn + 1}"
        )
