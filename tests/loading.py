"""What the tests of the load stage share: configs of models, folders to load, and how a refusal reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_LLAMA, model_config

from passes.errors import UserError
from pipeline.config.schema import ModelConfig
from pipeline.model.load import load

CPU = torch.device("cpu")


def nothing(_: str) -> None: ...


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(name="tiny", weights="random", architecture=dict(TINY_LLAMA) | changes)


def local(folder: Path, **changes: Any) -> ModelConfig:
    return model_config("local", path=str(folder), **changes)


def refusal(config: ModelConfig) -> str:
    """The message with which ``load`` refuses ``config``: one line."""
    with pytest.raises(UserError) as caught:
        load(config, "fp32", CPU, 0, nothing)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_gguf(
    path: Path,
    tensors: dict[str, torch.Tensor],
    kind: str = "llama",
    head: int = 16,
    factors: list[float] | None = None,
    blocks: bool = False,
    more: dict[str, Any] | None = None,
) -> None:
    """The tiny Llama as a float32 GGUF file with a byte-level tokenizer, as llama.cpp writes one.

    ``factors``: of the rotary frequencies; ``blocks``: matrices as Q8_0; ``more``: further metadata of ``kind``.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    writer = GGUFWriter(path, kind)
    for key, value in (more or {}).items():
        add = {int: writer.add_uint32, str: writer.add_string, float: writer.add_float32}[type(value)]
        add(f"{kind}.{key}", value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", torch.tensor(factors).numpy())
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(128)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + i) for i in range(94)] + ["ab", "cd", *(f"<{i}>" for i in range(32))])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
    }
    for name, tensor in tensors.items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        if heads:  # llama.cpp interleaves the two halves of each rotary head
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if blocks and tensor.ndim == 2:
            packed = quantize(tensor.contiguous().numpy(), GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
