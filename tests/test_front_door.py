"""``import passes`` in a script that is not ours: what is printed, what is rewritten, and that the answers stay."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import passes
from passes.errors import RunError, UserError
from passes.graph.lowering_pass import rewrite_proved

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def exported(name: str, longest: int = 64, *inputs: str, **changes: Any) -> ExportedProgram:
    """As a script does it: no options but the lengths; the caller's own copy."""
    return copy.deepcopy(_exported(name, longest, inputs, tuple(sorted(changes.items()))))


@functools.cache
def _exported(
    name: str, longest: int, inputs: tuple[str, ...], changes: tuple[tuple[str, Any], ...]
) -> ExportedProgram:
    given = {each: torch.ones(1, 8, dtype=torch.int64) for each in ("input_ids", *inputs)}
    length = {1: Dim("length", min=2, max=longest)}
    with torch.no_grad():
        return export(tiny.model(name, **dict(changes)), (), given, dynamic_shapes=dict.fromkeys(given, length))


def logits(program: ExportedProgram, length: int = 13, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return program.module()(input_ids=tiny.tokens(1, length), **more).logits


def calls(program: ExportedProgram) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is SDPA]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [(name, "lowering") for name in ("llama", "qwen2", "qwen3", "gpt2")] + [("llama", "detect_causal")],
)
def test_a_proved_mask_goes_and_the_answers_stay(name: str, strategy: str) -> None:
    program = exported(name)
    before = str(program.graph)

    fixed = passes.rewrite(program, strategy=strategy)

    assert str(program.graph) == before, "what is handed in stays as it is"
    assert all(node.args[3:6] == (None, 0.0, True) for node in calls(fixed.program))
    assert {call.mask for call in fixed.calls} == {"causal"} and {call.proof for call in fixed.calls} == {"proved"}
    assert "proved_attention" not in str(fixed.program.graph)
    torch.testing.assert_close(logits(fixed.program), logits(program))


def test_a_mask_that_is_not_proved_stays_in_atens_own_words() -> None:
    program = exported("mistral", 64, sliding_window=8)

    fixed = passes.rewrite(program)

    assert [call.mask for call in fixed.calls] == ["sliding_window"]
    assert all(node.args[3] is not None and node.target.namespace == "aten" for node in calls(fixed.program))
    assert torch.equal(logits(fixed.program), logits(program))
    with pytest.raises(RunError, match="not proved causal"):
        passes.rewrite(program, unproven="error")


def test_padding_is_kept_and_dropped_on_ones_word() -> None:
    program = exported("llama", 64, "attention_mask")
    ones = torch.ones(1, 13, dtype=torch.int64)

    kept, dropped = passes.rewrite(program), passes.rewrite(program, assume=["no_padding"])

    assert [call.action for call in kept.calls] == ["untouched"] * 2
    assert dropped.assumed == ["no_padding"] and all(node.args[3] is None for node in calls(dropped.program))
    torch.testing.assert_close(logits(dropped.program, attention_mask=ones), logits(program, attention_mask=ones))


def test_decomposed_attention_is_matmul_and_softmax_in_aten() -> None:
    program = exported("llama")
    fixed = passes.rewrite(program, strategy="decompose")
    assert calls(fixed.program) == []
    assert {node.target.namespace for node in fixed.program.graph.nodes if hasattr(node.target, "namespace")} == {
        "aten"
    }
    torch.testing.assert_close(logits(fixed.program), logits(program))


def test_the_result_is_saved_loaded_and_compiled_with_the_same_answers() -> None:
    fixed = passes.rewrite(exported("llama"))
    wanted = logits(fixed.program)

    file = io.BytesIO()
    torch.export.save(fixed.program, file)
    file.seek(0)
    assert torch.equal(logits(torch.export.load(file)), wanted)

    compiled = torch.compile(fixed.program.module(), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=tiny.tokens(1, 13)).logits, wanted)


def test_weights_are_shared_and_not_copied() -> None:
    program = exported("llama")
    fixed = passes.rewrite(program)
    weights = fixed.program.state_dict
    assert {name for name, each in program.state_dict.items() if weights[name].data_ptr() != each.data_ptr()} == set()


def test_a_strategy_that_is_none_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="strategy=upstream: allowed here: lowering, detect_causal, decompose"):
        passes.rewrite(exported("llama"), strategy="upstream")


# As a lowering pass of Torch-TensorRT


def lowered(program: ExportedProgram) -> torch.fx.GraphModule:
    torch_tensorrt = passes.load_torch_tensorrt()
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    settings = torch_tensorrt.dynamo.CompilationSettings(device=torch_tensorrt.Device(gpu_id=0))
    with torch.no_grad():
        return post_lowering(
            pre_export_lowering(program, settings).run_decompositions(get_decompositions()).module(), settings
        )


def attention(graph: torch.fx.GraphModule) -> list[Any]:
    return [node for node in graph.graph.nodes if node.target is SDPA]


def test_registered_it_proves_on_the_graph_that_it_is_handed_and_can_be_taken_out_again() -> None:
    untouched = attention(lowered(exported("llama", num_hidden_layers=1)))
    passes.register()
    try:
        passes.register()  # once is enough
        with passes.native_attention():  # and leaves what was registered
            pass
        proved = attention(lowered(exported("llama")))
        kept = attention(lowered(exported("mistral", 64, sliding_window=8)))
        padded = attention(lowered(exported("llama", 64, "attention_mask", num_hidden_layers=1)))
    finally:
        passes.unregister()

    assert all(node.args[3] is not None for node in (*untouched, *kept, *padded)) and kept and padded
    assert len(proved) == 2 and all(node.args[3:6] == (None, 0.0, True) for node in proved)
    assert all(node.kwargs["enable_gqa"] for node in proved), "without repeat_kv"
    again = attention(lowered(exported("llama", num_hidden_layers=1)))
    assert again and all(node.args[3] is not None for node in again)


@pytest.mark.slow
def test_a_window_as_wide_as_the_profile_is_causal_there_and_a_narrower_one_is_not() -> None:
    passes.register()
    try:
        wide, narrow = (attention(lowered(exported("mistral", n, sliding_window=64))) for n in (64, 65))
    finally:
        passes.unregister()
    assert wide[0].args[3] is None and narrow[0].args[3] is not None


def test_the_rewritten_graph_of_the_pass_gives_the_same() -> None:
    program = exported("llama")
    passes.register()
    try:
        graph = lowered(program)
    finally:
        passes.unregister()
    with torch.no_grad():
        (got, *_) = torch.utils._pytree.tree_leaves(graph(input_ids=tiny.tokens(1, 13)))
    torch.testing.assert_close(got, logits(program))


def test_it_proves_in_the_mode_in_which_torch_compile_calls_a_back_end() -> None:
    """No tensor that is made there holds numbers, and the second look at a proof must have some."""
    program = exported("llama")
    graph = program.run_decompositions({}).module()
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        found = rewrite_proved(graph)
    assert [(proof.mask.name, proof.looks > 0) for _, proof in found] == [("causal", True)] * 2
    with torch.no_grad():
        torch.testing.assert_close(graph(input_ids=tiny.tokens(1, 13)).logits, logits(program))


def test_a_graph_without_attention_passes_through() -> None:
    class Plain(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    passes.register()
    try:
        graph = lowered(export(Plain(), (torch.zeros(2),)))
    finally:
        passes.unregister()
    assert torch.equal(graph(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


# What an import costs


def test_importing_passes_imports_nothing_else() -> None:
    script = "import sys, passes.errors; print([name for name in ('torch', 'z3', 'tensorrt') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_public_is_there_and_nothing_else_is() -> None:
    assert all(callable(getattr(passes, name)) for name in passes.__all__)
    with pytest.raises(AttributeError, match="no attribute 'clasify'"):
        passes.clasify  # type: ignore[attr-defined]  # noqa: B018
