"""The forms of the front door on a GPU, each through a script that Torch-TensorRT's users write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import passes
from pipeline.verify.logits import FACTOR

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use"),
]
LONGEST = 256


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


@pytest.fixture(params=["llama", "qwen2"])
def form(request: pytest.FixtureRequest) -> Logits:
    return Logits(tiny.model(request.param, "fp16", torch.device("cuda"))).eval()


@pytest.fixture
def registered() -> Iterator[None]:
    passes.register()
    yield
    passes.unregister()


def exported(form: Logits) -> ExportedProgram:
    with torch.no_grad():
        length = {1: Dim("length", min=2, max=LONGEST)}
        return export(form, (tiny.tokens(1, 16).cuda(),), dynamic_shapes=(length,), strict=False)


def compiled(program: ExportedProgram) -> Callable[[Tensor], Tensor]:
    torch_tensorrt = passes.load_torch_tensorrt()
    shapes = {"min_shape": (1, 2), "opt_shape": (1, LONGEST), "max_shape": (1, LONGEST)}
    inputs = [torch_tensorrt.Input(**shapes, dtype=torch.int64)]
    return torch_tensorrt.dynamo.compile(program, inputs=inputs, min_block_size=1)


def check(engine: Callable[[Tensor], Any], form: Logits, lengths: tuple[int, ...] = (2, 77, LONGEST)) -> None:
    """At each length the answer is as near to PyTorch's one type wider as PyTorch's own times ``FACTOR``, where
    TensorRT-RTX adds fp16 up in fp16, so a unit roundoff for each term of a sum is PyTorch's at the least."""
    wide = copy.deepcopy(form).float()
    for length in lengths:
        tokens = tiny.tokens(1, length).cuda()
        with torch.no_grad():
            own, truth = form(tokens).double(), wide(tokens).double()
            got = torch.utils._pytree.tree_leaves(engine(tokens))[0].double()
        allowed = FACTOR * max(float((own - truth).norm()), 4 * 2**-11 * float(truth.norm()))
        assert float((got - truth).norm()) <= allowed, f"length {length}"


def test_rewrite_before_an_unchanged_compile(form: Logits) -> None:
    check(compiled(passes.rewrite(exported(form)).program), form)


def test_our_converter_with_and_without_the_masks(form: Logits) -> None:
    program = exported(form)
    with passes.native_attention():
        check(compiled(program), form)
        check(compiled(passes.rewrite(program).program), form)


@pytest.mark.usefixtures("registered")
def test_a_script_that_is_not_touched_after_register(form: Logits, monkeypatch: pytest.MonkeyPatch) -> None:
    proved = proofs(monkeypatch)
    check(compiled(exported(form)), form)
    assert proved == ["causal"] * len(form.model.model.layers)


@pytest.mark.usefixtures("registered")
def test_torch_compile_after_register(form: Logits, monkeypatch: pytest.MonkeyPatch) -> None:
    proved = proofs(monkeypatch)
    engine = torch.compile(form, backend="torch_tensorrt", dynamic=False, options={"min_block_size": 1})
    check(engine, form, (77,))
    assert proved == ["causal"] * len(form.model.model.layers)


def proofs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The masks that are found by the lowering pass from now on."""
    from passes import front_door

    found: list[str] = []
    original = front_door.rewrite_proved
    monkeypatch.setattr(
        front_door, "rewrite_proved", lambda graph: found.extend(proof.mask for _, proof in original(graph))
    )
    return found
