"""Complex numbers of a graph become real ones, and what cannot stays for its refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import length, program_of
from torch import Tensor

from passes.graph.complex_numbers import is_complex, write_out


def turned(x: Tensor) -> Tensor:
    """Rotary positions as Llama 4 has them."""
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01])
    turn = torch.polar(torch.ones_like(angles), angles) * 1.5
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[None, :, :]).flatten(2)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": turned,
    "a real factor on either side": lambda x: (x[..., 0] * torch.complex(x, x.flip(-1))[..., 1]).real,
    "sums, parts and moves": lambda x: ((z := torch.complex(x, 2 * x).transpose(0, 1)) + z - z[:, :1]).imag,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_what_is_written_out_computes_the_same(form: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 5, 6)
    graph = program_of(form, x, dynamic=({1: length(2, 12)},)).module()

    assert write_out(graph) > 0
    graph.graph.lint()
    graph.recompile()

    assert not any(is_complex(node) for node in graph.graph.nodes)
    longer = torch.randn(2, 9, 6)
    torch.testing.assert_close(graph(longer), form(longer))


@pytest.mark.parametrize("unknown", [lambda z: z.conj().resolve_conj().real, lambda z: (z + 1).abs()])
def test_an_operation_that_is_not_known_leaves_all_of_them(unknown: Any) -> None:
    graph = program_of(lambda x: unknown(torch.complex(x, x) * torch.complex(x, x)), torch.randn(2, 5)).module()
    before = str(graph.graph)
    assert write_out(graph) == 0 and str(graph.graph) == before
