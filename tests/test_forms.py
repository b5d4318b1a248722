"""Every form in which attention comes in a graph is read, proved and rewritten alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from passes import classify
from passes.errors import RunError
from passes.graph.rewrite import rewrite
from passes.graph.writing import SDPA
from passes.proof.calls import FORMS, find_calls

aten = torch.ops.aten
X = torch.randn(1, 2, 7, 16, generator=torch.Generator().manual_seed(0))
Attention = Callable[[Tensor, Tensor | None], Any]

# Form -> the call with a mask; the mask is bool for the first and additive for kernels.
MASKED: dict[Any, Attention] = {
    aten.scaled_dot_product_attention.default: lambda x, m: aten.scaled_dot_product_attention(x, x, x, m),
    aten._scaled_dot_product_efficient_attention.default: (
        lambda x, m: aten._scaled_dot_product_efficient_attention(x, x, x, m, False)
    ),
    aten._scaled_dot_product_cudnn_attention.default: (
        lambda x, m: aten._scaled_dot_product_cudnn_attention(x, x, x, m, False)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (
        lambda x, m: aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.0, False, attn_mask=m)
    ),
}
# Form -> the call that says itself that it is causal.
CAUSAL: dict[Any, Attention] = {
    aten.scaled_dot_product_attention.default: (
        lambda x, _: aten.scaled_dot_product_attention(x, x, x, is_causal=True)
    ),
    aten._scaled_dot_product_efficient_attention.default: (
        lambda x, _: aten._scaled_dot_product_efficient_attention(x, x, x, None, False, 0.0, True)
    ),
    aten._scaled_dot_product_cudnn_attention.default: (
        lambda x, _: aten._scaled_dot_product_cudnn_attention(x, x, x, None, False, 0.0, True)
    ),
    aten._scaled_dot_product_flash_attention.default: (
        lambda x, _: aten._scaled_dot_product_flash_attention(x, x, x, 0.0, True)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (
        lambda x, _: aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.0, True)
    ),
}


def program_of(form: Any, attention: Attention, window: int | None) -> torch.export.ExportedProgram:
    """``attention`` on the causal mask, or one that sees ``window`` keys, for every length up to 12."""

    def forward(x: Tensor) -> Tensor:
        q, k = torch.arange(x.shape[2])[:, None], torch.arange(x.shape[2])[None]
        mask = k <= q if window is None else (k <= q) & (k > q - window)
        if form is not SDPA:
            mask = torch.where(mask, 0.0, -torch.inf)
        made = attention(x, mask[None, None].expand(1, 2, -1, -1))
        return (made if isinstance(made, Tensor) else made[0]) * 1.0

    return tiny.program_of(forward, X, dynamic=({2: tiny.length(1, 12)},))


def test_every_form_is_here() -> None:
    assert {form for form, (mask, _) in FORMS.items() if mask is not None} <= set(MASKED)
    assert set(FORMS) == set(CAUSAL)


@pytest.mark.parametrize("form", MASKED, ids=str)
def test_a_mask_is_proved_in_every_form_and_the_call_rewritten(form: Any) -> None:
    for window, kind in ((None, "causal"), (3, "sliding_window")):
        program = program_of(form, MASKED[form], window)
        ((call, proof),) = classify(program)
        assert (call.node.target, proof.mask.name, proof.status) == (form, kind, "proved")

    program = program_of(form, MASKED[form], None)
    rewritten = rewrite(program, "lowering").program
    (call,) = find_calls(rewritten.graph_module)
    assert call.node.target is SDPA and call.is_causal and call.mask is None
    wanted = torch.nn.functional.scaled_dot_product_attention(X, X, X, is_causal=True)
    torch.testing.assert_close(rewritten.module()(X), wanted)


@pytest.mark.parametrize("form", CAUSAL, ids=str)
def test_a_call_that_says_that_it_is_causal_is_believed_in_every_form(form: Any) -> None:
    ((call, proof),) = classify(program_of(form, CAUSAL[form], None))
    assert call.is_causal and (proof.mask.name, proof.status) == ("causal", "proved")


def test_a_call_of_which_more_than_the_result_is_used_is_not_rewritten() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        made = aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.0, True)
        return made[0] * 1.0, made[1] * 1.0

    with pytest.raises(RunError, match="more than the result"):
        rewrite(tiny.program_of(forward, X), "lowering")


def test_attention_that_is_written_out_is_no_call_and_the_way_out_is_named() -> None:
    def forward(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x

    with pytest.raises(RunError, match="attn_implementation=sdpa"):
        classify(tiny.program_of(forward, X))
