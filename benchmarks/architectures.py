"""Tiny decoders of every architecture in the table of masks: transformers' own classes, random weights, no download."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TINY: dict[str, Any] = {
    # width
    "vocab_size": 64, "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 32, "ffn_hidden_size": 32, "ffn_dim": 32, "decoder_ffn_dim": 32,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "rotary_dim": 4,
    # depth and length
    "num_hidden_layers": 1, "n_layer": 1, "n_layers": 1, "num_layers": 1, "decoder_layers": 1,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "sliding_window": 6, "attention_chunk_size": 4,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    # special tokens within the vocabulary
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""What a config takes of this depends on its architecture: each names the same size differently."""

PLAIN = (
    "llama", "qwen2", "qwen3", "mixtral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt",
    "bloom", "mpt", "gpt_oss", "smollm3", "cohere", "cohere2", "gptj", "gpt_bigcode", "codegen", "llama4_text",
    "modernbert-decoder", "bart", "olmo", "olmo2", "olmo3", "olmoe", "starcoder2", "stablelm", "granite",
    "granitemoe", "glm", "glm4", "nemotron", "qwen2_moe", "qwen3_moe", "ministral", "ministral3", "exaone4",
    "ernie4_5", "arcee", "apertus", "helium", "persimmon", "biogpt", "xglm", "seed_oss", "hunyuan_v1_dense",
    "bitnet", "diffllama", "phimoe", "gpt_neox_japanese",
)  # fmt: skip
# Name in the table -> (model_type, what its config has beside TINY).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PLAIN},
    "mistral (no window)": ("mistral", {"sliding_window": None}),
    "mistral (window 6)": ("mistral", {"sliding_window": 6}),
    "mistral (window 12)": ("mistral", {"sliding_window": 12}),
    "falcon (rope)": ("falcon", {"alibi": False}),
    "falcon (alibi)": ("falcon", {"alibi": True}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6}),
    "bert (decoder)": ("bert", {"is_decoder": True}),
}


def config(name: str) -> Any:
    """The tiny ``transformers`` config: one layer of each type (full, sliding, chunked, ...) that the default has."""
    model_type, own = VARIANTS[name]
    default = AutoConfig.for_model(model_type).to_dict()
    sizes = {key: value for key, value in TINY.items() if key in default}
    if default.get("layer_types"):
        types = list(dict.fromkeys(default["layer_types"]))
        sizes |= {"layer_types": types, "num_hidden_layers": len(types)}
    return AutoConfig.for_model(model_type, **(sizes | own))


def build(name: str) -> PreTrainedModel:
    """The seeded model, in eval mode; raises ``ValueError`` where the class has no sdpa attention."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(name), attn_implementation="sdpa").eval()
