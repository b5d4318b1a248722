"""Which families of decoders there are, and a tiny model of each: transformers' own classes, random weights.

Sizes are such that a fused attention kernel exists for each head (16 channels), and that the lengths of
:mod:`benchmarks.family_runs` lie on both sides of every window, chunk and boundary of rotary factors.
"""

from __future__ import annotations

from typing import Any

from benchmarks.architectures import TINY
from pipeline.config.lengths import POSITIONS

SIZES: dict[str, Any] = TINY | {
    "vocab_size": 96, "hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "embedding_size": 64,
    "dim": 64, "emb_dim": 64, "head_dim": 16, "rotary_dim": 8, "kv_channels": 16, "attention_head_size": 16,
    "intermediate_size": 64, "moe_num_shared_experts": 1, "moe_layer_start_index": 0, "first_k_dense_replace": 0,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "max_target_positions": 64,
    "original_max_position_embeddings": 24, "sliding_window": 16, "sliding_window_size": 16, "window_size": 16,
    "attention_window_size": 16, "attention_chunk_size": 16,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0,
    "moe_k": 2, "intermediate_size_mlp": 64,
    "n_routed_experts": 4, "expert_ffn_hidden_size": 32, "zero_expert_num": 1, "moe_topk": 2,
    "num_experts_per_token": 2, "ngram_vocab_size_ratio": 1,
    # state spaces and short convolutions
    "mamba_d_state": 16, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "n_mamba_heads": 2, "mamba_dt_rank": 4, "mamba_d_ssm": 128,
    "state_size": 16, "time_step_rank": 4, "lru_width": 64, "n_groups": 1, "chunk_size": 16, "mamba_chunk_size": 16,
    "linear_head_dim": 16, "linear_num_heads": 4,
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "ple_embed_dim": 64,
    # bytes in patches
    "hidden_size_global": 64, "encoder_hash_byte_group_vocab": 96,
    # indexers of sparse attention
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64,
}  # fmt: skip
"""What a config takes of this depends on its family: each names the same size differently."""

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
          "qk_head_dim": 32, "num_key_value_heads": 4}  # fmt: skip
"""Attention over latents, as DeepSeek's: queries and keys of 32, values of 16."""

LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3] * 2,
            "long_factor": [2.0, 3.0, 5.0, 8.0] * 2, "original_max_position_embeddings": 24}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}  # fmt: skip

RECURRENT = frozenset({
    "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "granitemoehybrid", "bamba", "jamba", "falcon_h1", "nemotron_h",
    "mamba", "mamba2", "falcon_mamba", "bailing_hybrid", "inkling_text", "inkling2_text", "inkling2_loop_text",
    "kimi_linear", "lara_mini", "olmo_hybrid", "zamba", "zamba2", "zaya",
})  # fmt: skip
"""Families with layers that recur: over a cache their prompts run in chunks of 128 tokens, so they get longer ones."""

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWED = {"use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}
# Name in the table -> (model_type, what its config has beside SIZES); what people run most comes first.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama (3.x)": ("llama", {"rope_parameters": LLAMA3}),
    "llama4_text": ("llama4_text", {"moe_layers": [1], "num_hidden_layers": 2, "no_rope_layers": [1, 0]}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral (window)": ("mistral", {}),
    "ministral": ("ministral", {}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 (window)": ("qwen2", WINDOWED),
    "qwen3": ("qwen3", {}),
    "qwen3 (window)": ("qwen3", WINDOWED),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 (longrope)": ("phi3", {"sliding_window": None, "rope_parameters": LONGROPE}),
    "phimoe": ("phimoe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", {}),
    "stablelm": ("stablelm", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "layer_types": [FULL, FULL]}),
    "nemotron": ("nemotron", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "falcon (rope)": ("falcon", {"alibi": False}),
    "falcon (alibi)": ("falcon", {"alibi": True}),
    "mpt": ("mpt", {"max_seq_len": 128}),
    "bloom": ("bloom", {}),
    "opt": ("opt", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2,
                            "max_position_embeddings": 128}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "starcoder2 (window)": ("starcoder2", {}),
    "exaone4": ("exaone4", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "lfm2": ("lfm2", {"layer_types": ["conv", FULL], "num_hidden_layers": 2}),
    "qwen3_next": ("qwen3_next", {}),
    "granitemoehybrid": ("granitemoehybrid", {"layer_types": ["linear_attention", FULL], "num_hidden_layers": 2}),
    "bamba": ("bamba", {"attn_layer_indices": [1], "num_hidden_layers": 2}),
    "jamba": ("jamba", {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False}),
    "falcon_h1": ("falcon_h1", {}),
    "nemotron_h": ("nemotron_h", {}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8}),
}  # fmt: skip

INDEXERS = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
            "indexer_compress_ratio": 4}  # fmt: skip
SHARED = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}
"""The keys and values of two layers are those of the two before."""
GEMMA3N = SHARED | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "intermediate_size": 64}
WITHOUT_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
GEMMA4 = {"per_layer_config": {"1": {"head_dim": 512}}}

OWN: dict[str, dict[str, Any]] = {
    "xmod": {"default_language": "en_XX"},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", FULL], "num_hidden_layers": 2},
    "phi4_multimodal": {"vision_config": None, "audio_config": None},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA4 | {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
                                        "use_bidirectional_attention": "vision"}},
    "gemma4_text": SHARED | {"use_double_wide_mlp": True},
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_assistant": {"text_config": GEMMA4 | WITHOUT_INPUTS},
    "gemma4_unified_assistant": {"text_config": GEMMA4},
    "dory": {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING], "n_input_layers": 1,
             "n_recurrent_layers": 1, "n_output_layers": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "cohere_compass_text": {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 10000.0,
                                                       "mrope_section": [4, 2, 2]}}},
    "qwen4_exp_text": INDEXERS,
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8]},
    "rwkv": {"num_hidden_layers": 2},
}  # fmt: skip
"""Of families without a row above: what their config has beside SIZES."""

NEEDED = {"gemma4_assistant": {"text_config": {"model_type": "gemma4_text"} | WITHOUT_INPUTS}}
"""What transformers' own default of a family has to be told, or it refuses it."""


def names() -> list[str]:
    """Every family, those of :data:`NAMED` first; of model types that share a class the one it is called after."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    taken = {model_type for model_type, _ in NAMED.values()}
    by_class: dict[str, list[str]] = {}
    for model_type, made in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        by_class.setdefault(made, []).append(model_type)
    every = {_called_after(made, types) for made, types in by_class.items() if not taken & set(types)}
    return [*NAMED, *sorted(every)]


def _called_after(made: str, types: list[str]) -> str:
    def common(model_type: str) -> int:
        plain = model_type.replace("_", "").replace("-", "").removesuffix("text")
        return (len(plain) if made.lower().startswith(plain) else 0) + model_type.endswith("_text")

    return max(types, key=common)


def described(name: str) -> dict[str, Any]:
    """What ``config.json`` of the tiny model says: one layer of each type (full, sliding, ...) that the default has.

    Raises what transformers raises where it refuses these sizes.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type, own = NAMED.get(name, (name, OWN.get(name, {})))
    default = AutoConfig.for_model(model_type, **NEEDED.get(name, {})).to_dict()
    if name not in NAMED and default.get("is_decoder") is False:
        own = own | {"is_decoder": True}
    small = _small(default)
    if name in RECURRENT:
        small |= {key: 256 for key in POSITIONS if key in default}
    for key, value in own.items():
        small[key] = small[key] | value if isinstance(value, dict) and key in small else value
    made: dict[str, Any] = AutoConfig.for_model(model_type, **small).to_dict()
    return made | {"model_type": model_type, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]}


def _small(default: dict[str, Any]) -> dict[str, Any]:
    """``default`` with the sizes of :data:`SIZES`, the configs within it included."""
    sizes = {key: value for key, value in SIZES.items() if key in default}
    if "qk_rope_head_dim" in default:
        sizes |= {key: value for key, value in LATENT.items() if key in default}
    if types := default.get("layer_types") or default.get("layers_block_type"):
        kinds = list(dict.fromkeys(types))
        own = "layer_types" if default.get("layer_types") else "layers_block_type"
        sizes |= {own: kinds, "num_hidden_layers": len(kinds)}
    for key, value in default.items():
        if isinstance(value, dict) and "model_type" in value:
            sizes[key] = {**value, **_small(value)}
    return sizes
