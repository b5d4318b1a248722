"""Engines on the GPU whose masks block every key of some rows: those rows are 0, as in PyTorch, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from passes.graph.prepare import prepare
from passes.graph.rewrite import rewrite
from passes.tensorrt.versions import load_stack, quiet
from pipeline.config.schema import BackendConfig
from pipeline.engine import network as compile
from pipeline.engine.build import build_engine
from pipeline.engine.runner import Engine
from pipeline.trace.call_form import InputSpec, Traced

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that TensorRT can run on"),
]

HEADS, SIZE, LENGTH = 4, 64, 256


class Attention(nn.Module):
    """Token ids [1, length] -> attention [1, HEADS, length, SIZE] in which a query sees only keys before it whose token
    is not 0: the first row sees none, and neither does any row behind nothing but zeros."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(32, 3 * HEADS * SIZE, generator=generator)
        self.table = nn.Parameter(table.half(), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        split = nn.functional.embedding(input_ids, self.table).view(1, -1, 3, HEADS, SIZE)
        query, key, value = (part.transpose(1, 2) for part in split.unbind(2))
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        seen = (at < at[:, None])[None, None] & (input_ids != 0)[:, None, None]
        mask = seen if self.form == "bool" else torch.where(seen, 0.0, -torch.inf).half()
        return scaled_dot_product_attention(query, key, value, mask)


def tokens() -> Tensor:
    """[1, LENGTH]; the first seven are 0, so that eight rows see nothing."""
    made = torch.randint(1, 32, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    made[0, :7] = 0
    return made


def traced(form: str, static: bool, device: str) -> Traced:
    example = {"input_ids": tokens()[:, : LENGTH if static else 11].to(device)}
    dynamic: Any = None if static else {"input_ids": {1: torch.export.Dim("length", min=2, max=LENGTH)}}
    with torch.no_grad(), quiet():
        program = prepare(torch.export.export(Attention(form).to(device), (), example, dynamic_shapes=dynamic))
    return Traced(program, (InputSpec("input_ids", 1, LENGTH if static else 2, LENGTH, LENGTH),))


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", ["bool", "-inf"])
@pytest.mark.parametrize("strategy", ["detect_causal", "mask_input", "decompose"])
def test_rows_that_see_no_key_are_zero(strategy: str, form: str, static: bool) -> None:
    stack, given = load_stack(), traced(form, static, "cuda")
    rewritten = rewrite(given.program, strategy)
    lowered = compile.lower(stack, rewritten.program, given.inputs, BackendConfig("tensorrt"), "fp16")
    network = compile.interpret(stack, lowered, compile.ours())
    engine = Engine(stack, build_engine(stack, network, lambda *_: True).data, given.inputs)
    module = Attention(form).cuda()

    for length in (LENGTH,) if static else (LENGTH, 5, 77):
        ids = tokens()[:, :length].cuda()
        made, right = engine({"input_ids": ids}), module(ids)
        blank = min(8, length)
        assert torch.equal(made[:, :, :blank], torch.zeros_like(made[:, :, :blank]))
        torch.testing.assert_close(made, right, rtol=1e-2, atol=1e-2)
