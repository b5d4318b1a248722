"""Tiny random causal LMs and programs traced from them, each made once a session.

``llama``, ``qwen2`` and ``qwen3`` are the architectures of ``conf/model`` with small sizes; the others have what those
lack: ``mistral`` a sliding window, ``gpt2`` and ``phi3`` one projection for query, key and value, and the rest of them
attention and MLP side by side.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from conftest import model_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from transformers import PreTrainedModel

from passes.graph import driver
from passes.graph.prepare import prepare
from passes.graph.rewrite import rewrite
from passes.graph.rewritten import Rewritten
from passes.tensorrt.network_passes import PASSES
from passes.tensorrt.versions import quiet
from pipeline.config.schema import ModelConfig, ShapeConfig
from pipeline.model.load import load
from pipeline.trace.call_form import CallForm, Traced, trace

CPU = torch.device("cpu")
Changes = tuple[tuple[str, Any], ...]
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHIPPED = {"llama": "llama3_1b", "qwen2": "qwen2_5_0_5b", "qwen3": "qwen3_0_6b"}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "phi3": {"model_type": "phi3"},
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["full_attention"],
    },
    "phi": {"model_type": "phi"},
    "cohere": {"model_type": "cohere"},
    "gptj": {"model_type": "gptj", "rotary_dim": 8},
    "stablelm": {"model_type": "stablelm", "use_parallel_residual": True},
    "gpt_neox": {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "use_parallel_residual": True,
    },
    "falcon": {
        "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": True,
        "bias": False, "alibi": False,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 128, "n_positions": 1024, "n_embd": 64, "n_layer": 1, "n_head": 4,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def architecture(name: str) -> dict[str, Any]:
    """The ``transformers`` config of tiny model ``name``: one layer (``llama`` two, which share their mask), and heads
    of 16, so that to scale by 1/4 rounds nothing."""
    if name == "gpt2":
        return dict(OTHERS[name])
    shipped = model_config(SHIPPED[name]).architecture if name in SHIPPED else OTHERS[name]
    layers = {"num_hidden_layers": 2} if name == "llama" else {}
    return shipped | SIZES | layers | ({"head_dim": 16} if "head_dim" in shipped else {})


def config(name: str, inputs: tuple[str, ...] = ("input_ids",), **changes: Any) -> ModelConfig:
    return ModelConfig(
        name=name, weights="random", inputs=list(inputs), logits="all", architecture=architecture(name) | changes
    )


def model(name: str, precision: str = "fp32", device: torch.device = CPU, **changes: Any) -> PreTrainedModel:
    """Seeded, in eval mode; shared by every test, so not to be changed."""
    return _model(name, precision, device, tuple(sorted(changes.items())))


@functools.cache
def _model(name: str, precision: str, device: torch.device, changes: Changes) -> PreTrainedModel:
    return load(config(name, **dict(changes)), precision, device, 0, lambda _: None).model


def traced(
    name: str,
    precision: str = "fp32",
    inputs: tuple[str, ...] = ("input_ids",),
    batch: int = 1,
    lengths: tuple[int, int] = (1, 64),
    device: torch.device = CPU,
    exact: tuple[int, ...] = (),
    **changes: Any,
) -> Traced:
    """Tiny model ``name`` traced for the range ``lengths``, static where both ends are equal; the caller's own copy."""
    made = _traced(name, precision, inputs, ShapeKey(batch, *lengths), device, tuple(sorted(changes.items())))
    with quiet():
        return Traced(copy.deepcopy(made.program), tuple(replace(spec, exact=exact) for spec in made.inputs))


class ShapeKey(NamedTuple):
    batch: int
    least: int
    most: int


@functools.cache
def _traced(
    name: str, precision: str, inputs: tuple[str, ...], shape: ShapeKey, device: torch.device, changes: Changes
) -> Traced:
    kind = "static" if shape.least == shape.most else "dynamic"
    asked = ShapeConfig(kind, shape.batch, shape.least, shape.most, shape.most)
    form = CallForm(_model(name, precision, device, changes), "all")
    return trace(form, config(name, inputs, **dict(changes)), asked, device)


def rewritten(strategy: str, unproven: str | None, name: str, **how: Any) -> Rewritten:
    """``traced(name, **how)`` after strategy ``strategy``."""
    return rewrite(traced(name, **how).program, strategy, unproven)


def with_fused_rows(graph: GraphModule) -> None:
    """What is done to a graph of single rows before it is converted, in place."""
    rows = tuple(each for each in PASSES if each.name in ("write_squares", "fuse_rows", "join_queries_and_keys"))
    driver.run(rows, graph, lambda each: each)


def logits(program: ExportedProgram, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return program.module()(**inputs)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


class Function(nn.Module):
    """A function of tensors as a module, for ``torch.export``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def program_of(function: Callable[..., Any], *inputs: Tensor, dynamic: Any = None) -> ExportedProgram:
    """``function`` of positional tensors, exported and prepared.

    ``dynamic`` is ``torch.export``'s dynamic_shapes, one entry an input.
    """
    with torch.no_grad(), quiet():
        return prepare(
            torch.export.export(
                Function(function),
                inputs,
                dynamic_shapes=(dynamic,) if dynamic else None,
                prefer_deferred_runtime_asserts_over_guards=True,  # as pipeline.trace.call_form does
            )
        )


def length(least: int = 1, most: int = 12) -> Any:
    return Dim("length", min=least, max=most)
