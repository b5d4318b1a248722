"""Shared fixtures: the real SmolLM2 once a session, and tiny models for what needs no real weights."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.config.schema import ModelConfig

if TYPE_CHECKING:
    from passes.proof.second_look import Look
    from pipeline.model.load import LoadedModel

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

HEAVIEST = (
    "test_served.py", "test_gemma.py", "test_run.py", "test_take_home.py", "test_sweep.py", "test_decode.py",
    "test_front_door.py", "test_endings.py", "test_generation_engine.py", "test_config.py", "test_compile.py",
    "test_mask_catalogue.py", "test_store.py", "test_assume.py", "test_masks.py", "test_soundness.py",
    "test_profiles.py", "test_unread.py", "test_tracking.py", "test_native_attention.py", "test_packaging.py",
    "test_symbolic.py", "test_families.py", "test_ring_chunks.py",
)  # fmt: skip
"""Those that take half a minute and more, the longest first, so that no worker is still at one of them when the others
have nothing left to do."""

CONF = Path(__file__).parent.parent / "conf"

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_config(name: str, **changes: Any) -> ModelConfig:
    """The ``ModelConfig`` of ``conf/model/NAME.yaml`` with some keys changed."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    assert isinstance(plain, dict)
    return ModelConfig(**{str(key): value for key, value in plain.items()} | changes)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct, pretrained, float32, CPU; fetched the first time and then kept in the user's cache."""
    import torch

    from pipeline.model.load import load

    return load(model_config("smollm2_135m"), "fp32", torch.device("cpu"), 0, print)


def save_tiny_llama(folder: Path, **changes: Any) -> Path:
    """Make ``folder`` that of a random Llama of 0.1 M parameters (GQA 4/2 heads of 16), no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**TINY_LLAMA | changes)).save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(HEAVIEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def prover_and_program_agree(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mask that is not what was proved of it is an error of ours, whatever the test that meets it looks for."""
    masks = sys.modules.get("passes.proof.masks")
    found: list[str] = []
    if masks is not None and request.node.get_closest_marker("wrong_prover") is None:
        look = masks.look

        def noted(*args: Any, **kwargs: Any) -> Look:
            seen: Look = look(*args, **kwargs)
            found.extend([seen.disagreement] if seen.disagreement else [])
            return seen

        monkeypatch.setattr(masks, "look", noted)
    yield
    assert not found


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with its tables, which take seconds to create, and nothing else: to be copied."""
    from pipeline.tracking import store

    path = tmp_path_factory.mktemp("migrated") / "mlflow.db"
    with store.quiet():
        store.open_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def tiny_llama_dir(tmp_path: Path) -> Path:
    """A Hugging Face folder with a random Llama, see :func:`save_tiny_llama`."""
    return save_tiny_llama(tmp_path / "tiny-llama")


@pytest.fixture
def messages() -> tuple[list[str], Callable[[str], None]]:
    """A list, and a progress callback that fills it."""
    lines: list[str] = []
    return lines, lines.append


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for whole runs; making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pipeline"])
    return folder


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str, str]]:
    """Runs ``python -m pipeline.compare`` and returns its exit code, what it wrote (HTML and Markdown) and what it said
    to stderr."""
    from pipeline.compare.__main__ import main

    def run(*arguments: object) -> tuple[int, str, str, str]:
        out = tmp_path / "page"
        code = main([*map(str, arguments), "-o", str(out)])
        texts = [(out / name).read_text() if out.exists() else "" for name in ("comparison.html", "comparison.md")]
        shutil.rmtree(out, ignore_errors=True)
        return code, *texts, capsys.readouterr().err

    return run
