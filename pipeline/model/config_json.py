"""``config.json``: whether it describes a causal LM that can be run here, before any weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import UserError, whole_message
from pipeline.model import gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def read_json(path: Path, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_float_or_object)
    except (OSError, ValueError) as error:
        raise UserError(f"{origin}: cannot read {path.name} ({whole_message(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{origin}: {path.name} is not a JSON object")
    return content


def _float_or_object(read: dict[str, Any]) -> Any:
    """transformers writes a float that JSON has no word for as ``{"__float__": "Infinity"}``."""
    value = read.get("__float__")
    return float(value) if len(read) == 1 and value in ("Infinity", "-Infinity", "NaN") else read


def unused_code(described: dict[str, Any]) -> str | None:
    """What the reader must know of code that a config (of a model or a tokenizer) names and that is never run."""
    named = described.get("auto_map")
    if not named:
        return None
    first = next(iter(named.values())) if isinstance(named, dict) else named
    first = next((name for name in first if name), first) if isinstance(first, (list, tuple)) else first
    return f"code that comes with the model ({first}) was not run: transformers' own classes stand in for it"


def causal_lm(raw: dict[str, Any], origin: str) -> PreTrainedConfig:
    """``raw`` (the contents of a config.json) as the config of a causal LM that transformers has code for.

    Raises :class:`UserError`, beginning with ``origin``, for anything else: encoders, encoder-decoders, models
    that bring code of their own, and weights quantised in a way that is not read.  How weights are stored is not in it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = raw.get("model_type")
    needs_code = (
        f"needs code that comes with the model, and trust_remote_code is never on; "
        f"choose a model that transformers {__version__} has itself"
    )
    if kind not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise UserError(f"{origin}: model_type={kind} {needs_code}")
        raise UserError(f"{origin}: model_type={kind} is not known to transformers {__version__}; install a newer one?")
    from pipeline.model.stored.folder import format_of  # with torch, which a mistake in a setting need not wait for

    format_of(raw, None, origin)  # refuses what is not read
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    try:
        with gguf.quiet():
            config = CONFIG_MAPPING[kind].from_dict(plain)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{origin}: transformers refuses this {kind} config ({whole_message(error)})") from None

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    wanted = set(names) if isinstance(names, (tuple, list)) else {names} - {None}
    stated = set(raw.get("architectures") or ())
    # Without `architectures`, `is_decoder=False` is what tells an encoder such as BERT, which also has a causal head.
    encoder = not stated and getattr(config, "is_decoder", True) is False
    if not wanted or getattr(config, "is_encoder_decoder", False) or encoder or (stated and not stated & wanted):
        found = ", ".join(sorted(stated)) or f"model_type={kind} without architectures"
        if wanted and stated and raw.get("auto_map"):
            raise UserError(f"{origin}: {found} {needs_code}")
        needed = f"architectures has to name {' or '.join(sorted(wanted))}" if wanted else "name another model"
        if stated & wanted:
            needed = "is_encoder_decoder=true in its config; name a model that is a decoder alone"
        raise UserError(f"{origin}: {found} is not a causal LM; {needed}")
    return config
