"""The load stage: which weights are loaded, how exactly, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONF, TINY_LLAMA, model_config
from loading import CPU, edit_config, local, nothing, refusal, tiny

from benchmarks.families import described
from passes.errors import UserError
from pipeline.config.schema import ModelConfig
from pipeline.host.plain_json import to_json
from pipeline.model import checkpoint
from pipeline.model.load import LoadedModel, load, load_reference
from pipeline.model.text import token_batch

TINY_MOE = {
    "model_type": "deepseek_v3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}
SHIPPED = ("smollm2_135m", "gemma3_270m", "llama3_1b", "mistral_7b", "qwen2_5_0_5b", "qwen3_0_6b")


# The shipped architectures


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2_135m", 134_515_008),
        ("gemma3_270m", 268_098_176),
        ("llama3_1b", 1_235_814_400),
        ("mistral_7b", 7_241_732_096),
        ("qwen2_5_0_5b", 494_032_768),
        ("qwen3_0_6b", 596_049_920),
    ],
)
def test_shipped_architecture_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.architecture(model_config(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", SHIPPED)
def test_transformers_knows_every_key_of_a_shipped_architecture(name: str) -> None:
    raw = model_config(name).architecture
    assert set(raw) - set(type(checkpoint.architecture(model_config(name)))().to_dict()) == set()


@pytest.mark.parametrize("name", [*SHIPPED, "local"])
def test_shipped_model_file_spells_out_every_key(name: str) -> None:
    text = (CONF / "model" / f"{name}.yaml").read_text()
    for key in ModelConfig.__dataclass_fields__:
        assert f"\n{key}:" in text


def test_llama_rope_scaling_reaches_the_model() -> None:
    config = checkpoint.architecture(model_config("llama3_1b"))
    config.num_hidden_layers = 1
    from transformers import LlamaModel

    with torch.device("cpu"):
        rotary = LlamaModel(config).rotary_emb
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    # llama3 scaling leaves the highest frequency alone and divides the lowest by the factor of 32.
    assert torch.isclose(rotary.inv_freq[0], plain[0])
    assert torch.isclose(rotary.inv_freq[-1], plain[-1] / 32)


# Random weights


@pytest.mark.parametrize(
    ("precision", "dtype", "wider"),
    [
        ("fp16", torch.float16, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("fp32", torch.float32, torch.float64),
    ],
)
def test_reference_holds_the_same_random_weights_one_type_wider(
    precision: str, dtype: torch.dtype, wider: torch.dtype
) -> None:
    loaded = load(tiny(), precision, CPU, 7, nothing)
    reference = load_reference(tiny(), precision, CPU, 7)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert {p.dtype for p in reference.parameters()} == {wider}
    for ours, theirs in zip(loaded.model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("weights", ["random", "pretrained"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_rotary_frequencies_stay_float32(tiny_llama_dir: Path, weights: str, precision: str) -> None:
    config = local(tiny_llama_dir, weights=weights)
    expected = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    for model in (load(config, precision, CPU, 0, nothing).model, load_reference(config, precision, CPU, 0)):
        frequencies = model.model.rotary_emb.inv_freq
        assert frequencies.dtype == torch.float32
        assert torch.allclose(frequencies, expected, rtol=1e-6)


def test_random_weights_stay_float32_where_transformers_wants_them_to() -> None:
    config = ModelConfig(name="moe", weights="random", architecture=TINY_MOE)
    layer = load(config, "fp16", CPU, 0, nothing).model.model.layers[0]
    assert layer.mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert layer.self_attn.o_proj.weight.dtype == torch.float16


def test_seed_decides_the_random_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (load(tiny(), "fp32", CPU, seed, nothing).model.lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("family", ["openai-gpt", "data2vec-text", "apertus"])
def test_what_transformers_leaves_as_memory_was_is_drawn_too(family: str) -> None:
    """Other numbers each time, and now and then none at all."""
    config = ModelConfig(name="tiny", weights="random", architecture=described(family))
    first, again = (load(config, "fp32", CPU, 0, nothing).model.state_dict() for _ in range(2))
    assert all(torch.isfinite(each).all() for each in first.values())
    assert all(torch.equal(each, again[name]) for name, each in first.items())
    reference = load_reference(config, "fp16", CPU, 0).state_dict()
    assert all(torch.equal(each.float(), first[name].float()) for name, each in reference.items())
    assert not torch.are_deterministic_algorithms_enabled()


def test_random_weights_have_the_spread_that_the_architecture_asks_for() -> None:
    model = load(tiny(initializer_range=0.03), "fp32", CPU, 0, nothing).model
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.03, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(64))


def test_loaded_model_is_ready_to_be_traced() -> None:
    loaded = load(tiny(), "fp16", CPU, 0, nothing)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.model.config.use_cache is False
    assert loaded.model.dtype == torch.float16


def test_description_has_the_keys_of_the_report() -> None:
    loaded = load(tiny(), "fp16", CPU, 0, nothing)
    assert to_json(loaded.describe()) == {
        "name": "tiny",
        "source": "model.architecture",
        "revision": None,
        "sha256": None,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "weights": "random",
    }


# A local folder


def test_local_folder_gives_its_weights_name_and_hash(tiny_llama_dir: Path) -> None:
    from safetensors.torch import load_file

    loaded = load(local(tiny_llama_dir), "fp32", CPU, 0, nothing)
    for name, tensor in load_file(tiny_llama_dir / "model.safetensors").items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert (loaded.name, loaded.source, loaded.weights) == ("tiny-llama", str(tiny_llama_dir), "pretrained")
    assert loaded.sha256 == hashlib.sha256((tiny_llama_dir / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.tokenizer is None


def test_reference_of_pretrained_weights_is_not_rounded(tiny_llama_dir: Path) -> None:
    exact = load(local(tiny_llama_dir), "fp32", CPU, 0, nothing).model
    reference = load_reference(local(tiny_llama_dir), "fp16", CPU, 0)
    assert torch.equal(reference.lm_head.weight, exact.lm_head.weight)
    assert not torch.equal(reference.lm_head.weight, reference.lm_head.weight.half().float())


def test_random_weights_of_a_local_folder_need_only_its_config(tiny_llama_dir: Path) -> None:
    (tiny_llama_dir / "model.safetensors").unlink()
    loaded = load(local(tiny_llama_dir, weights="random"), "fp32", CPU, 0, nothing)
    assert loaded.model.config.num_key_value_heads == 2
    assert (loaded.name, loaded.source, loaded.weights) == ("tiny-llama", str(tiny_llama_dir), "random")


def test_sharded_weights_are_loaded_and_hashed_together(tiny_llama_dir: Path) -> None:
    whole = load(local(tiny_llama_dir), "fp32", CPU, 0, nothing)
    (tiny_llama_dir / "model.safetensors").unlink()
    whole.model.save_pretrained(tiny_llama_dir, max_shard_size="100KB")
    shards = sorted(tiny_llama_dir.glob("*.safetensors"))
    assert len(shards) > 1
    loaded = load(local(tiny_llama_dir), "fp32", CPU, 0, nothing)
    assert torch.equal(loaded.model.lm_head.weight, whole.model.lm_head.weight)
    lines = "".join(f"{s.name} {hashlib.sha256(s.read_bytes()).hexdigest()}\n" for s in shards)
    assert loaded.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    shards[0].unlink()
    assert shards[0].name in refusal(local(tiny_llama_dir))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is not a causal LM"),
        ({"model_type": "bert"}, "without architectures is not a causal LM"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal LM"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "LlamaModel is not a causal LM"),
        ({"model_type": "their_own", "auto_map": {"AutoConfig": "a.B"}}, "trust_remote_code is never on"),
        ({"model_type": "their_own"}, "not known to transformers"),
        ({}, "model_type=None"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}, "quantised by hqq"),
        ({"model_type": "llama", "hidden_size": "wide"}, "refuses this llama config"),
    ],
)
@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_folder_of_another_kind_is_refused_by_its_config_alone(
    tmp_path: Path, raw: dict[str, Any], says: str, weights: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    message = refusal(local(tmp_path, weights=weights))
    assert message.startswith(f"model.path={tmp_path}: ")
    assert says in message


def test_broken_config_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "cannot read config.json" in refusal(local(tmp_path))


def test_pickled_weights_are_never_loaded(tiny_llama_dir: Path) -> None:
    (tiny_llama_dir / "model.safetensors").unlink()
    assert "holds no weights" in refusal(local(tiny_llama_dir))
    torch.save({}, tiny_llama_dir / "pytorch_model.bin")
    message = refusal(local(tiny_llama_dir))
    assert "pytorch_model.bin, which is a pickle" in message
    assert "model.weights=random" in message


def test_weights_that_do_not_fit_the_config_are_refused(tiny_llama_dir: Path) -> None:
    edit_config(tiny_llama_dir, num_hidden_layers=3)
    assert "missing_keys" in refusal(local(tiny_llama_dir))
    edit_config(tiny_llama_dir, num_hidden_layers=2, intermediate_size=80)
    assert "mismatched_keys" in refusal(local(tiny_llama_dir))


def test_truncated_weights_are_refused(tiny_llama_dir: Path) -> None:
    weights = tiny_llama_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal(local(tiny_llama_dir)).startswith(f"model.path={tiny_llama_dir}: its weights cannot be read")


def test_weights_that_the_model_has_no_place_for_are_named(
    tiny_llama_dir: Path, messages: tuple[list[str], Any]
) -> None:
    edit_config(tiny_llama_dir, num_hidden_layers=1)
    load(local(tiny_llama_dir), "fp32", CPU, 0, messages[1])
    assert any("9 tensors" in line and "model.layers.1" in line for line in messages[0])


def test_architecture_that_contradicts_the_weights_is_refused(tiny_llama_dir: Path) -> None:
    message = refusal(local(tiny_llama_dir, architecture={"num_hidden_layers": 1}))
    assert message.startswith("model.architecture.num_hidden_layers=1: ")
    load(local(tiny_llama_dir, architecture=dict(TINY_LLAMA) | {"eos_token_id": 9}), "fp32", CPU, 0, nothing)


def test_broken_tokenizer_is_refused(tiny_llama_dir: Path) -> None:
    (tiny_llama_dir / "tokenizer.json").write_text("{}")
    (tiny_llama_dir / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "its tokenizer cannot be read" in refusal(local(tiny_llama_dir))


# Input text


def test_text_rows_differ_fit_and_repeat_for_the_same_seed(smollm2: LoadedModel) -> None:
    tokens = token_batch(smollm2.tokenizer, 49152, 4, 300, 0)
    assert tokens.shape == (4, 300)
    assert tokens.dtype == torch.int64
    assert len({tuple(row.tolist()) for row in tokens}) == 4
    assert torch.equal(tokens, token_batch(smollm2.tokenizer, 49152, 4, 300, 0))
    assert not torch.equal(tokens, token_batch(smollm2.tokenizer, 49152, 4, 300, 1))


def test_text_is_real_and_long_enough_for_the_default_profile(smollm2: LoadedModel) -> None:
    assert smollm2.tokenizer is not None
    row = token_batch(smollm2.tokenizer, 49152, 1, 2300, 0)[0]
    text = (CONF.parent / "pipeline" / "model" / "prompts.txt").read_text()
    assert smollm2.tokenizer.decode(row[:1000]) in text + text  # consecutive pieces of the prose
    starts = {tuple(row[i : i + 16].tolist()) for i in range(2284)}
    assert len(starts) == 2284  # nothing repeats within 2300 tokens
    logits = smollm2.model(row[None, :512]).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], row[1:512])
    assert loss < 4.5  # the model reads it as English; uniform tokens give 10.8 and more


def test_longer_text_wraps_around(smollm2: LoadedModel) -> None:
    row = token_batch(smollm2.tokenizer, 49152, 1, 6000, 0)[0]
    period = next(p for p in range(2300, 3000) if torch.equal(row[:-p], row[p:]))
    assert period >= 2300


def test_without_a_tokenizer_tokens_are_random_and_in_range() -> None:
    tokens = token_batch(None, 50, 3, 1000, 0)
    assert tokens.shape == (3, 1000)
    assert (tokens.min().item(), tokens.max().item()) == (0, 49)
    assert torch.equal(tokens, token_batch(None, 50, 3, 1000, 0))
    assert not torch.equal(tokens, token_batch(None, 50, 3, 1000, 1))


def test_tokenizer_of_another_model_is_refused(smollm2: LoadedModel) -> None:
    with pytest.raises(UserError, match="vocab_size=100"):
        token_batch(smollm2.tokenizer, 100, 1, 8, 0)
