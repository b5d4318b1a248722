"""The softmax scale goes into the weights where that changes nothing else, and nowhere otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from passes.graph.prepare import prepare
from passes.graph.rewrite import rewrite
from passes.graph.scale import fold_scale
from passes.proof.calls import find_calls
from passes.tensorrt.versions import quiet

# Model -> the parameters that take the scale.
FOLDED = {"llama": ("q_proj.weight",), "qwen2": ("q_proj.weight", "q_proj.bias"), "qwen3": ("q_norm.weight",)}


def filled(name: str, precision: str) -> ExportedProgram:
    """``name`` traced, with parameters that transformers starts at 0 or 1 (biases, norms) drawn at random."""
    program = tiny.traced(name, precision).program
    generator = torch.Generator().manual_seed(0)
    for key, weight in program.state_dict.items():
        if weight.dim() == 1 and "inv_freq" not in key:
            drawn = torch.rand(weight.shape, generator=generator) + 0.5
            program.state_dict[key] = nn.Parameter(drawn.to(weight.dtype), requires_grad=False)
    return program


@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in FOLDED), ("llama", "fp16")])
def test_folding_a_power_of_two_changes_no_bit_of_the_logits(name: str, precision: str) -> None:
    program = filled(name, precision)
    before = dict(program.state_dict)
    inputs = {"input_ids": tiny.tokens(1, 33)}
    wanted = tiny.logits(program, **inputs)
    for call in find_calls(program.graph_module):
        assert call.scale == 0.25
        assert fold_scale(program, call.node, call.query, call.scale) is None
        call.node.update_kwarg("scale", 1.0)
    program.graph_module.recompile()
    assert torch.equal(tiny.logits(program, **inputs), wanted)

    changed = {key for key, weight in program.state_dict.items() if weight is not before[key]}
    assert changed == {key for key in before if key.endswith(FOLDED[name])}
    for key in changed:
        # Exact but where fp16 has no smaller number of the same precision.
        smallest = torch.finfo(before[key].dtype).smallest_normal
        normal = before[key].abs() * 0.25 >= smallest
        assert torch.equal(program.state_dict[key][normal], before[key][normal] * 0.25)


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("strategy", ["detect_causal", "lowering", "mask_input"])
def test_a_folded_scale_is_gone_from_the_graph(name: str, strategy: str) -> None:
    rewritten = tiny.rewritten(strategy, {"detect_causal": "mask", "lowering": "keep"}.get(strategy), name)
    scales = [
        node.kwargs.get("scale", node.args[-1])
        for node in rewritten.program.graph.nodes
        if "proved_attention.native" in str(node.target) or "scaled_dot_product_attention" in str(node.target)
    ]
    assert set(scales) == {1.0} and {call.scale for call in rewritten.calls} == {"in the weights"}


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_a_fused_projection_keeps_its_scale_and_its_weights(name: str) -> None:
    program = tiny.traced(name).program
    before = dict(program.state_dict)
    inputs = {"input_ids": tiny.tokens(1, 33)}
    wanted = tiny.logits(program, **inputs)
    rewritten = rewrite(program, "detect_causal", "mask")
    for call in rewritten.calls:
        assert call.action == "native_causal" and call.scale.startswith("in the graph: ")
    assert all(rewritten.program.state_dict[key] is weight for key, weight in before.items())
    torch.testing.assert_close(tiny.logits(rewritten.program, **inputs), wanted)


# -- hand-written projections ------------------------------------------------------------------------


class Projected(nn.Module):
    """Attention over x [1, length, 16] whose query, key and value ``make`` makes with two projections."""

    def __init__(
        self, make: Callable[[Projected, Tensor], tuple[Tensor, Tensor, Tensor]], shared: bool = False
    ) -> None:
        super().__init__()
        self.make = make
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        if shared:
            self.two.weight = self.one.weight
        self.norm = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (tensor if tensor.dim() == 4 else tensor[:, None] for tensor in self.make(self, x))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def fold(module: Projected) -> tuple[str | None, bool, ExportedProgram]:
    """The obstacle, whether any weight was changed, and the program with the scale at 1 where there was none."""
    x = torch.zeros(1, 5, 16, dtype=torch.float64)
    with torch.no_grad(), quiet():
        program = prepare(export(module.double(), (x,)))
    before = dict(program.state_dict)
    (call,) = find_calls(program.graph_module)
    obstacle = fold_scale(program, call.node, call.query, call.scale)
    if obstacle is None:
        call.node.update_kwarg("scale", 1.0)
        program.graph_module.recompile()
    return obstacle, any(program.state_dict[key] is not weight for key, weight in before.items()), program


def rotated(x: Tensor) -> Tensor:
    return x * 0.8 + torch.cat([-x[..., 8:], x[..., :8]], -1) * 0.6


FOLDABLE = {
    "a projection": lambda m, x: (m.one(x), m.two(x), x),
    "after a rotation": lambda m, x: (rotated(m.one(x)), rotated(m.two(x)), x),
    "through a norm's weight": lambda m, x: (m.norm * nn.functional.normalize(m.one(x), dim=-1), x, x),
    "a sum of two projections": lambda m, x: (m.one(x) - m.two(x), x, x),
    "a gate from elsewhere": lambda m, x: (x.sigmoid() * m.one(x), m.two(x), x),
    "doubled": lambda m, x: (m.one(x) + m.one(x), m.two(x), x),
}
UNFOLDABLE = {
    "not a projection": (lambda m, x: (x, x, x), "not computed from weights"),
    "nonlinear": (lambda m, x: (m.one(x).tanh(), x, x), "not homogeneous"),
    "shifted": (lambda m, x: (m.one(x) + 1, x, x), "not computed from weights"),
    "squared": (lambda m, x: (m.one(x).square(), x, x), "not homogeneous"),
    "multiplied with itself": (lambda m, x: ((q := m.one(x)) * q, x, x), "by what is scaled"),
    "gated by itself": (lambda m, x: ((q := m.one(x)) * q.sigmoid(), x, x), "used elsewhere"),
    "projected twice and added": (lambda m, x: ((q := m.one(x)) + m.two(q), x, x), "by what is scaled"),
    "its own key": (lambda m, x: ((q := m.one(x)[:, None]), q, x), "by what is scaled"),
    "its own value": (lambda m, x: ((q := m.one(x)[:, None]), x, q), "by what is scaled"),
    "a rotation of its key": (lambda m, x: ((q := m.one(x)), rotated(q), x), "used elsewhere"),
    "half of a projection": (lambda m, x: ((q := m.one(x))[..., :8], q[..., 8:], x), "used elsewhere"),
    "a weight of the norm squared": (lambda m, x: (m.norm * m.norm * m.one(x), x, x), "by what is scaled"),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_folded_scale_leaves_the_function_and_the_traced_module_alone(name: str) -> None:
    module = Projected(FOLDABLE[name])
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    module = module.double()
    weights = {key: weight.clone() for key, weight in module.state_dict().items()}
    wanted = module(x)
    obstacle, changed, program = fold(module)
    assert obstacle is None and changed
    torch.testing.assert_close(program.module()(x), wanted)
    assert all(torch.equal(weight, weights[key]) for key, weight in module.state_dict().items())


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_what_is_not_scaled_with_its_weights_is_left_as_it_is(name: str) -> None:
    make, reason = UNFOLDABLE[name]
    obstacle, changed, _ = fold(Projected(make))
    assert obstacle is not None and not changed
    assert reason in obstacle


def test_a_weight_that_the_key_shares_is_not_scaled() -> None:
    module = Projected(FOLDABLE["a projection"], shared=True).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    wanted = module(x)
    obstacle, changed, program = fold(module)
    assert changed == (obstacle is None)
    torch.testing.assert_close(program.module()(x), wanted)
