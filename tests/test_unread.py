"""Rows that nothing reads are not computed, and those that are read stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.functional import layer_norm, linear
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig, GPT2Config

from passes.graph.rewrite import rewrite
from passes.graph.row_narrowing import narrow
from pipeline.config.schema import CacheConfig, ShapeConfig
from pipeline.trace import cached_forms
from pipeline.trace.cache_shape import cache_shape
from pipeline.trace.call_form import CallForm, exported, trace

LINEAR = torch.ops.aten.linear.default


def last_rows(name: str, static: bool = False, logits: str = "last") -> ExportedProgram:
    """Two layers of tiny ``name`` over 12 tokens, or 1 to 12."""
    shape = ShapeConfig("static" if static else "dynamic", 1, 12 if static else 1, 12, 12)
    form = CallForm(tiny.model(name, num_hidden_layers=2), logits)
    return trace(form, tiny.config(name, num_hidden_layers=2), shape, tiny.CPU).program


def rows_of_products(program: ExportedProgram) -> list[Any]:
    return [node.meta["val"].shape[1] for node in program.graph.nodes if node.target is LINEAR]


@pytest.mark.parametrize(
    ("name", "strategy", "static"),
    [
        pytest.param(name, strategy, static, marks=() if quick else pytest.mark.slow)
        for name in ("llama", "qwen2", "qwen3", "phi3")
        for strategy in ("detect_causal", "lowering", "decompose")
        for static in (True, False)
        for quick in (not static and (name == "llama" or (name, strategy) == ("phi3", "detect_causal")),)
    ],
)
def test_the_last_layer_runs_over_one_row_behind_its_attention(name: str, strategy: str, static: bool) -> None:
    before = last_rows(name, static)

    rewritten = rewrite(copy.deepcopy(before), strategy)

    assert rewritten.narrowed > 10
    per_layer = 4 if name == "phi3" else 7  # phi3 has one product for query, key and value, and one for gate and up
    rows = rows_of_products(rewritten.program)
    behind = 3 if name == "phi3" else 4  # output, gate, up, down
    assert rows[-1 - behind :] == [1] * (behind + 1) and len(rows) == 2 * per_layer + 1
    assert all(str(each) != "1" for each in rows[: -1 - behind])
    for length in (12,) if static else (1, 2, 5, 12):
        tokens = tiny.tokens(1, length)
        found, wanted = (tiny.logits(program, input_ids=tokens) for program in (rewritten.program, before))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_upstream_gets_is_left_alone() -> None:
    assert rewrite(last_rows("llama"), "upstream").narrowed == 0


def test_where_every_rows_logits_are_read_every_row_is_computed() -> None:
    assert rewrite(last_rows("llama", logits="all"), "detect_causal").narrowed == 0


def test_each_prompt_of_a_batch_has_its_own_last_row() -> None:
    model, shape = tiny.model("llama"), ShapeConfig("dynamic", 3, 2, 8, 12)
    cache = cache_shape(model, CacheConfig("static"), shape, 20)
    traced = cached_forms.trace_prefill(cached_forms.PrefillForm(model, cache), cache, shape, tiny.CPU)
    inputs = {"input_ids": tiny.tokens(3, 9), "last": torch.tensor([8, 3, 5])}
    before = traced.program.module()(**inputs)

    rewritten = rewrite(traced.program, "detect_causal")

    assert rewritten.narrowed > 10 and rows_of_products(rewritten.program)[-5:] == [3] * 5
    for one, other in zip(rewritten.program.module()(**inputs), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


GEMMAS = {
    "gemma": (GemmaConfig, "sdpa", {"head_dim": 16}),
    "gemma2": (Gemma2Config, "eager", {"head_dim": 16}),  # transformers has no sdpa for its capped scores
    "gemma3": (Gemma3TextConfig, "sdpa", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": (GPT2Config, "sdpa", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("gemma", "gemma3") else ()) for name in GEMMAS]
)
def test_what_is_cast_to_the_type_of_another_is_narrowed_too(name: str) -> None:
    """In half precision, where Gemma's norms are computed in fp32 and cast back by ``type_as``."""
    kind, attention, changes = GEMMAS[name]
    sizes = tiny.SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 4} | changes
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(kind(**sizes), attn_implementation=attention, dtype=torch.bfloat16).eval()
    tokens = {"input_ids": tiny.tokens(1, 12)}
    program = exported(CallForm(made, "last"), tokens, {"input_ids": {1: tiny.length()}})
    wanted = tiny.logits(program, **tokens)

    assert narrow(program.graph_module) > 10
    program.graph_module.graph.lint()
    program.graph_module.recompile()

    kinds = (LINEAR, torch.ops.aten.addmm.default)
    rows = [node.meta["val"].shape[-2] for node in program.graph.nodes if node.target in kinds]
    behind = 3 if name == "gpt2" else 4  # output, up, down; and gate
    assert rows[-1 - behind :] == [1] * (behind + 1)
    torch.testing.assert_close(tiny.logits(program, **tokens), wanted, rtol=2e-2, atol=2e-2)


SIZE, ROWS = 4, 4  # as many of one as of the other, so that a matrix of values fits as weights
Rows = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of values [ROWS, SIZE], weights [SIZE, SIZE] and places, which rows are read."""
# What must not be narrowed, or only in part, though rows are chosen of it.
REFUSED: dict[str, Rows] = {
    "a product with itself": lambda x, w, at: linear(h := linear(x, w), h)[-1:],
    "a product with what is narrowed": lambda x, w, at: (linear(h := linear(x, w), w) + linear(x, h))[-1:],
    "a bias for each row": lambda x, w, at: linear(x, w, linear(x, w))[-1:],
    "an addmm with a bias for each row": lambda x, w, at: torch.addmm(linear(x, w), x, w)[-1:],
    "a norm by itself": lambda x, w, at: layer_norm(h := linear(x, w), (ROWS, SIZE), h)[-1:],
    "the values of topk": lambda x, w, at: torch.topk(linear(x, w), 2, 0)[0][-1:],
    "the places of topk": lambda x, w, at: linear(x, w)[torch.topk(linear(x, w), 4, 0)[1][:, 0]][-1:],
    "a maximum over columns": lambda x, w, at: linear(x, w).max(0, keepdim=True)[0].expand(ROWS, SIZE)[-1:],
    "sorted": lambda x, w, at: linear(x, w).sort(0).values[-1:],
    "a variance and a mean": lambda x, w, at: torch.var_mean(linear(x, w), 1, keepdim=True)[1].expand(ROWS, SIZE)[-1:],
    "a mean of all": lambda x, w, at: (linear(x, w) - linear(x, w).mean())[-1:],
    "a mean of no axis in particular": lambda x, w, at: (linear(x, w) - torch.mean(linear(x, w), []))[-1:],
    "one row for all, named twice": lambda x, w, at: linear(x[:1], w)[at * 0],
    "one row for all, behind a sum": lambda x, w, at: (linear(x[:1], w) + w[0])[at * 0],
    "rows by a mask": lambda x, w, at: linear(x, w)[torch.tensor([True, False, True, True])],
    "rows as columns": lambda x, w, at: linear(linear(x, w).t(), w).t()[-1:],
    "rows mixed": lambda x, w, at: linear(x, w).reshape(2, 2, SIZE).transpose(0, 1).reshape(ROWS, SIZE)[-1:],
    "pieces of rows": lambda x, w, at: torch.cat(linear(x, w).split(2)[::-1])[-1:],
    "every second": lambda x, w, at: linear(x, w)[::2],
    "the last two": lambda x, w, at: linear(x, w)[-2:],
    "the last column": lambda x, w, at: linear(x, w)[:, -1:].expand(ROWS, SIZE),
    "written later": lambda x, w, at: later(linear(x, w))[-1:],
}
NARROWED: dict[str, Rows] = {
    "the last": lambda x, w, at: linear(x, w)[-1:],
    "places from either end": lambda x, w, at: linear(x.tanh(), w)[at],
    "behind views with sizes left open": lambda x, w, at: linear(x, w).view(-1, 2, 2).reshape(1, ROWS, -1)[:, -1:],
    "behind heads": lambda x, w, at: (linear(x, w).view(ROWS, 2, 2).mT * 2).mT.reshape(-1, SIZE)[at],
    "behind pieces": lambda x, w, at: (linear(x, w).chunk(4, -1)[0] * x.split(1, 1)[1] * w[0])[-1:],
    "behind a piece beside one that is read whole": lambda x, w, at: (
        linear((h := linear(x, w).chunk(2, -1))[0], w[:, :2]) + h[1].sum()
    )[at],
    "read by two": lambda x, w, at: ((h := linear(x, w)) * linear(h, w))[at],
    "of a mean of each row": lambda x, w, at: ((h := linear(x, w)) * h.mean(-1, keepdim=True))[-1:],
    "with what is one row for all": lambda x, w, at: (linear(x, w) * x[:1] + w)[at],
}  # fmt: skip


def later(x: Tensor) -> Tensor:
    made = x * 1
    made[-1].zero_()
    return made


@pytest.mark.parametrize("name", [*REFUSED, *NARROWED])
def test_rows_are_chosen_further_up_only_where_they_are_made_each_from_its_own(name: str) -> None:
    choose = (REFUSED | NARROWED)[name]

    def forward(x: Tensor, w: Tensor, at: Tensor) -> Tensor:
        return linear(choose(x, w, at), torch.eye(SIZE))

    inputs = torch.randn(ROWS, SIZE), torch.randn(SIZE, SIZE), torch.tensor([-1, 1])
    program = tiny.program_of(forward, *inputs)

    narrowed = narrow(program.graph_module)
    program.graph_module.graph.lint()
    program.graph_module.recompile()

    found, wanted = program.module()(*inputs), forward(*inputs)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted)
    if name in NARROWED:
        assert narrowed > 0


def test_a_graph_that_writes_to_its_tensors_is_left_alone() -> None:
    def forward(x: Tensor, at: Tensor) -> Tensor:
        made = linear(x, torch.eye(SIZE)).tanh()
        read = made * 1
        made[:, 0].fill_(3.0)
        return linear((read + made)[at], torch.eye(SIZE))

    inputs = torch.randn(ROWS, SIZE), torch.tensor([0])
    graph = torch.export.export(tiny.Function(forward), inputs).graph_module
    assert narrow(graph) == 0
    prepared = tiny.program_of(forward, *inputs)
    narrow(prepared.graph_module)
    prepared.graph_module.recompile()
    torch.testing.assert_close(prepared.module()(*inputs), forward(*inputs))
