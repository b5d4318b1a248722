"""The config.json of a GGUF file that has none beside it, from its own metadata.

Nothing is guessed: a key that is not understood ends it, since what it says could change what the model computes.
Which key of ggml's is which of transformers' is llama.cpp's ``convert_hf_to_gguf.py``, read backwards.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.host.gguf_header import Header, read

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""What every known architecture says."""
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every published Llama 3.1, 3.2 and 3.3; the file has the factors that follow from them instead."""

_BIASES = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}

Settings = dict[str, Any]


def config_of(path: Path) -> Settings:
    """The contents of a config.json; raises :class:`OSError`, and :class:`ValueError` where the file does not say, or
    says what is not understood."""
    header = read(path)
    kind = header.architecture
    if kind not in _ARCHITECTURES:
        raise ValueError(f"its architecture {kind} is none of those that are read so ({', '.join(_ARCHITECTURES)})")
    own = {key: _published(value) for key, value in header.own().items()}
    for key in _KEYS:
        if not isinstance(own.get(key), int | float):
            what = "differs from layer to layer" if isinstance(own.get(key), list) else "is missing"
            raise ValueError(f"{kind}.{key} {what}")
    if "token_embd.weight" not in header.tensors:
        raise ValueError("it holds no token_embd.weight")

    made: Settings = {theirs: own.pop(key) for key, theirs in _KEYS.items()}
    whole = own.get("rope.dimension_count", made["hidden_size"] // made["num_attention_heads"])
    made["head_dim"] = own.pop("attention.key_length", whole)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := own.pop(key, made["head_dim"])) != made["head_dim"]:
            raise ValueError(f"{kind}.{key}={size} is another size than that of a head, {made['head_dim']}")
    made["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    if (said := own.pop("vocab_size", made["vocab_size"])) != made["vocab_size"]:
        raise ValueError(f"{kind}.vocab_size={said} is not that of its embedding, {made['vocab_size']}")
    made["tie_word_embeddings"] = "output.weight" not in header.tensors
    for key, theirs in _TOKENS.items():
        made[theirs] = header.metadata.get(f"tokenizer.ggml.{key}")
    made |= _ARCHITECTURES[kind](header, own, _rotary(kind, own, made, header, path), made)
    if own:
        raise ValueError(f"{kind}.{min(own)}={own[min(own)]} is not understood")
    return made


def _published(value: Any) -> Any:
    """A float32 as whoever wrote it typed it: 1e-06 for 9.999999974752427e-07."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _rotary(kind: str, own: Settings, made: Settings, header: Header, path: Path) -> Settings:
    """``rope_parameters``, from the keys that ``own`` then has no more, and from llama3's factors."""
    base = {"rope_theta": own.pop("rope.freq_base", 10000.0)}
    scaling = own.pop("rope.scaling.type", "none")
    given = {key: own.pop(f"rope.scaling.{key}", None) for key in ("factor", "original_context_length")}
    own.pop("rope.scaling.finetuned", None)
    if "rope_freqs.weight" in header.tensors:
        return base | _llama3(base["rope_theta"], made["head_dim"], header, path)
    if scaling == "none" or given["factor"] in (None, 1.0):
        return base | {"rope_type": "default"}
    if scaling == "linear":
        return base | {"rope_type": "linear", "factor": given["factor"]}
    if scaling == "yarn" and given["original_context_length"]:
        original = {"original_max_position_embeddings": given["original_context_length"]}
        return base | {"rope_type": "yarn", "factor": given["factor"]} | original
    raise ValueError(f"{kind}.rope.scaling.type={scaling} is not understood")


def _llama3(theta: float, size: int, header: Header, path: Path) -> Settings:
    """The scaling whose factors the file holds, a float32 for each pair of a head: what it divides frequencies by."""
    stored = header.tensors["rope_freqs.weight"]
    pairs = size // 2
    if stored.type != 0 or stored.shape != (pairs,):
        raise ValueError(f"rope_freqs.weight is not {pairs} float32 numbers")
    with path.open("rb") as file:
        file.seek(stored.offset)
        found = struct.unpack(f"<{pairs}f", file.read(4 * pairs))
    factor = _published(max(found))
    low, high, length = _LLAMA3.values()
    for pair, actual in enumerate(found):
        turns = length * theta ** (-2 * pair / size) / (2 * math.pi)  # within the length that it was trained on
        share = min(1.0, max(0.0, (turns - low) / (high - low)))  # of the frequency that stays as it is
        if not math.isclose(1 / ((1 - share) / factor + share), actual, rel_tol=1e-4):
            raise ValueError("rope_freqs.weight is not llama3's scaling of a text of 8192 tokens")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _llama(header: Header, own: Settings, rotary: Settings, made: Settings) -> Settings:
    biases = {key: f"blk.0.{of}.bias" in header.tensors for key, of in _BIASES.items()}
    return {"model_type": "llama", "rope_parameters": rotary, **biases}


def _qwen2(header: Header, own: Settings, rotary: Settings, made: Settings) -> Settings:
    return {"model_type": "qwen2", "rope_parameters": rotary, "use_sliding_window": False}


def _qwen3(header: Header, own: Settings, rotary: Settings, made: Settings) -> Settings:
    biased = "blk.0.attn_q.bias" in header.tensors
    return {"model_type": "qwen3", "rope_parameters": rotary, "use_sliding_window": False, "attention_bias": biased}


def _gemma3(header: Header, own: Settings, rotary: Settings, made: Settings) -> Settings:
    """Five windows, then the whole text, which alone has scaled positions; the 27B model, the only one of 62 layers,
    scales queries by the width of a head before there were heads of their own size (llama.cpp's ``gemma3.cpp``)."""
    windows = {"rope_type": "default", "rope_theta": own.pop("rope.freq_base_swa", 10000.0)}
    if "attention.sliding_window" not in own:
        raise ValueError("gemma3.attention.sliding_window is missing")
    of_27b = made["num_hidden_layers"] == 62
    return {
        "model_type": "gemma3_text",
        "rope_parameters": {"sliding_attention": windows, "full_attention": rotary},
        "sliding_window": own.pop("attention.sliding_window"),
        "query_pre_attn_scalar": made["hidden_size"] // made["num_attention_heads"] if of_27b else made["head_dim"],
    }


_ARCHITECTURES: dict[str, Callable[[Header, Settings, Settings, Settings], Settings]] = {
    "gemma3": _gemma3,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
