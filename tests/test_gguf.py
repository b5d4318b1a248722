"""A GGUF file alone: its own metadata says what the model is, or one line says why it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_LLAMA, save_tiny_llama
from loading import CPU, local, nothing, refusal, write_gguf
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel

from passes.errors import UserError
from pipeline.__main__ import compose_config
from pipeline.model import gguf_config
from pipeline.model.load import load
from pipeline.sweep.keys import Commits, content_key

EMBEDDING = {"model.embed_tokens.weight": torch.zeros(128, 64)}
LLAMA_3_2 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_a_gguf_file_alone_says_what_it_is(tmp_path: Path) -> None:
    tensors = load_file(save_tiny_llama(tmp_path / "source") / "model.safetensors")
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "tiny.gguf"
    write_gguf(alone, tensors)
    for path in (alone, alone.parent):
        loaded = load(local(path), "fp32", CPU, 0, nothing)
        assert loaded.tokenizer is not None and loaded.notes == ()
        assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in tensors.items())
        told = {key: getattr(loaded.model.config, key) for key in TINY_LLAMA}
        assert told == TINY_LLAMA
    random = load(local(alone, weights="random"), "fp32", CPU, 0, nothing)
    assert random.parameters == loaded.parameters and random.tokenizer is None


def test_lengths_follow_a_gguf_file_and_its_path_is_enough_to_name_it(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    write_gguf(file, EMBEDDING)
    short, long = compose_config([f"model={file}"]), compose_config(["model=local", f"model.path={file}"])
    assert short == long and short.shape.max == 256
    assert content_key(short, "", Commits()) == content_key(long, "", Commits())
    with pytest.raises(UserError, match=r"shape.max=512: above the model's max_position_embeddings=256"):
        compose_config([f"model={file}", "shape.max=512"])


@pytest.mark.usefixtures("cache")
def test_blocks_are_dequantised_exactly_and_named(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, dequantize, quantize

    tensors = load_file(save_tiny_llama(tmp_path / "source") / "model.safetensors")
    write_gguf(tmp_path / "a.gguf", tensors, blocks=True)
    loaded = load(local(tmp_path / "a.gguf"), "fp32", CPU, 0, nothing)
    assert [note for note in loaded.notes if "Q8_0: they were dequantised" in note]
    name = "model.layers.1.mlp.down_proj.weight"
    packed = quantize(tensors[name].numpy(), GGMLQuantizationType.Q8_0)
    expected = torch.from_numpy(dequantize(packed, GGMLQuantizationType.Q8_0))
    assert torch.equal(loaded.model.state_dict()[name], expected) and not torch.equal(expected, tensors[name])


def test_scaled_positions_of_a_gguf_file_are_those_of_the_model(tmp_path: Path) -> None:
    """llama.cpp stores what llama3's scaling divides each frequency by, in the place of its settings."""
    config = LlamaConfig(**TINY_LLAMA | {"head_dim": 64, "num_hidden_layers": 1, "rope_parameters": LLAMA_3_2})
    frequencies = LlamaModel(config).rotary_emb.inv_freq
    factors = (500000.0 ** (-torch.arange(0, 64, 2) / 64) / frequencies).tolist()
    file, theta = tmp_path / "a.gguf", {"rope.freq_base": 500000.0}
    write_gguf(file, EMBEDDING, head=64, factors=factors, more=theta)
    assert gguf_config.config_of(file)["rope_parameters"] == LLAMA_3_2
    factors[20] *= 1.01
    write_gguf(file, EMBEDDING, head=64, factors=factors, more=theta)
    with pytest.raises(ValueError, match="is not llama3's scaling"):
        gguf_config.config_of(file)
    scaled = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    write_gguf(file, EMBEDDING, more=scaled)
    assert gguf_config.config_of(file)["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("llama", {"expert_count": 8}, "llama.expert_count=8 is not understood"),
        ("llama", {"attention.value_length": 32}, "llama.attention.value_length=32 is another size"),
        ("llama", {"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, "llama.rope.scaling.type=ntk"),
        ("gemma3", {}, "gemma3.attention.sliding_window is missing"),
        ("rwkv7", {}, "its architecture rwkv7 is none of those that are read so (gemma3, llama, qwen2, qwen3)"),
    ],
)
def test_what_a_gguf_file_does_not_say_is_not_guessed(
    tmp_path: Path, kind: str, more: dict[str, Any], says: str
) -> None:
    file = tmp_path / "a.gguf"
    write_gguf(file, EMBEDDING, kind, more=more)
    message = refusal(local(file))
    assert message.startswith(f"model.path={file}: a.gguf has no config.json beside it, and ")
    assert says in message and message.endswith("name a folder that holds it and its model's config.json")


def test_a_gguf_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    write_gguf(file, EMBEDDING)
    whole = file.read_bytes()
    for size in (0, 2, 30, 200):
        file.write_bytes(whole[:size])
        assert f"model.path={file}: a.gguf has no config.json beside it, and" in refusal(local(file))
    (tmp_path / "b.gguf").write_bytes(whole)
    with pytest.raises(UserError, match=r"holds no config.json and 2 GGUF files; name one of them"):
        compose_config(["model=local", f"model.path={tmp_path}"])
