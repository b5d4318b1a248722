"""Rows that nothing reads are not computed, and those that are read stay what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

from passes.rewrite import apply_strategy
from passes.unread import narrow
from pipeline import cached
from pipeline.config import CacheConfig, ShapeConfig
from pipeline.export import CallForm, trace

LINEAR = torch.ops.aten.linear.default


def last_rows(name: str, static: bool = False, logits: str = "last") -> ExportedProgram:
    """Two layers of tiny ``name`` over 12 tokens, or 1 to 12."""
    shape = ShapeConfig("static" if static else "dynamic", 1, 12 if static else 1, 12, 12)
    form = CallForm(tiny.model(name, num_hidden_layers=2), logits)
    return trace(form, tiny.config(name, num_hidden_layers=2), shape, tiny.CPU).program


def rows_of_products(program: ExportedProgram) -> list[Any]:
    return [node.meta["val"].shape[1] for node in program.graph.nodes if node.target is LINEAR]


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("strategy", ["detect_causal", "lowering", "decompose"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_the_last_layer_runs_over_one_row_behind_its_attention(name: str, strategy: str, static: bool) -> None:
    before = last_rows(name, static)

    rewritten = apply_strategy(copy.deepcopy(before), strategy)

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
    assert apply_strategy(last_rows("llama"), "upstream").narrowed == 0


def test_where_every_rows_logits_are_read_every_row_is_computed() -> None:
    assert apply_strategy(last_rows("llama", logits="all"), "detect_causal").narrowed == 0


def test_each_prompt_of_a_batch_has_its_own_last_row() -> None:
    model, shape = tiny.model("llama"), ShapeConfig("dynamic", 3, 2, 8, 12)
    cache = cached.cache_shape(model, CacheConfig("static"), shape, 20)
    traced = cached.trace_prefill(cached.PrefillForm(model, len(cache.layers)), cache, shape, tiny.CPU)
    inputs = {"input_ids": tiny.tokens(3, 9), "last": torch.tensor([8, 3, 5])}
    before = traced.program.module()(**inputs)

    rewritten = apply_strategy(traced.program, "detect_causal")

    assert rewritten.narrowed > 10 and rows_of_products(rewritten.program)[-5:] == [3] * 5
    for one, other in zip(rewritten.program.module()(**inputs), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


SIZE, ROWS = 4, 5
STEPS: dict[str, Any] = {  # [1, ROWS, SIZE] -> the same; the last ones mix rows
    "double": lambda x, w: x + x,
    "gate": lambda x, w: torch.nn.functional.silu(x) * x,
    "weigh": lambda x, w: x * w[0],
    "by row": lambda x, w: x * w[1:2].expand(ROWS, SIZE),
    "norm": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer norm": lambda x, w: torch.nn.functional.layer_norm(x, (SIZE,), w[0]),
    "product": lambda x, w: torch.nn.functional.linear(x, w),
    "heads": lambda x, w: (x.view(1, ROWS, 2, 2).transpose(1, 2) * 2).transpose(1, 2).reshape(1, ROWS, SIZE),
    "turned": lambda x, w: (x.permute(2, 0, 1) + 1).permute(1, 2, 0),
    "pieces": lambda x, w: torch.cat(list(x.chunk(2, dim=-1))[::-1], -1),
    "half": lambda x, w: x * x[..., :1],
    "over rows": lambda x, w: x - x.mean(1, keepdim=True),
    "running": lambda x, w: x.cumsum(1),
    "flipped": lambda x, w: x.flip(1),
    "as columns": lambda x, w: torch.nn.functional.linear(x.transpose(1, 2), torch.ones(ROWS, ROWS)).transpose(1, 2),
    "other half": lambda x, w: x + x[:, 1:2],
    "rows in pieces": lambda x, w: x * x.split(1, dim=1)[2],
    "reshaped": lambda x, w: x.reshape(1, SIZE, ROWS).transpose(1, 2),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=7),
    st.lists(st.integers(0, 7), max_size=2),
    st.booleans(),
)
def test_what_is_read_stays_the_same_whatever_works_on_the_rows(
    steps: list[str], kept: list[int], by_index: bool
) -> None:
    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(SIZE, SIZE) for _ in steps])

        def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
            made = [x]
            for step, weight in zip(steps, self.weights, strict=True):
                made.append(STEPS[step](made[-1], weight) + made[0])
            last = made[-1][:, rows] if by_index else made[-1][:, -1:]
            return (torch.nn.functional.linear(last, torch.eye(SIZE)), *(made[i % len(made)] * 1 for i in kept))

    inputs = torch.randn(1, ROWS, SIZE), torch.tensor([3, 1])
    program = torch.export.export(Program(), inputs).run_decompositions({})
    before = program.module()(*inputs)

    narrow(program.graph_module)
    program.graph_module.graph.lint()
    program.graph_module.recompile()

    for one, other in zip(program.module()(*inputs), before, strict=True):
        torch.testing.assert_close(one, other)
