"""Kinds of operations that more than one pass asks for: what each of a kind does to its tensor's elements."""

from __future__ import annotations

import torch

from passes.quantised import ROWS_IN_E4M3

aten = torch.ops.aten

RESHAPES = (aten.view.default, aten.reshape.default, aten._reshape_copy.default)
"""The same elements in the same order, in another shape."""

VIEW_LIKE = (*RESHAPES, aten.clone.default, aten.expand.default, aten.unsqueeze.default, aten._unsafe_view.default)
"""The same elements in the same order, repeated along new or widened axes or not."""

ARITHMETIC = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.sqrt.default,
    aten.rsqrt.default, aten.pow.Tensor_Scalar, aten._to_copy.default,
)  # fmt: skip
"""What norms and rotary positions are made of, each element from those at its own place."""

POINTWISE = frozenset(
    {
        *ARITHMETIC, aten.reciprocal.default, aten.exp.default, aten.sigmoid.default, aten.tanh.default,
        aten.relu.default, aten.silu.default, aten.gelu.default, aten.alias.default, aten.clone.default,
        aten.detach.default, ROWS_IN_E4M3,
    }
)  # fmt: skip
"""Each element from those at its own place; arguments are broadcast from the right."""
