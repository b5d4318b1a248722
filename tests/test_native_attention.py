"""Our converter in Torch-TensorRT's registry: every form of attention becomes a native layer that says what torch says.

The networks are made by Torch-TensorRT's own interpreter, as for any script: nothing of the pipeline converts here.
"""

from __future__ import annotations

import copy
import functools
import operator
from typing import Any

import pytest
import torch
from attention_cases import FAMILIES, Calls, Family, cases, exported, inputs, lengths
from tiny import Function
from torch import Tensor
from torch.export import export
from torch.fx import GraphModule, Interpreter
from torch.nn.functional import scaled_dot_product_attention as sdpa

import passes
from passes.tensorrt import registry
from passes.tensorrt.attention import asked
from passes.tensorrt.versions import load_stack, quiet
from pipeline.engine.build import build_engine
from pipeline.engine.network import Network
from pipeline.engine.sections import Engine
from pipeline.engine.session import Session
from pipeline.verify.logits import FACTOR

GPU = torch.cuda.is_available()
CALLS = {registry.SDPA, registry.EFFICIENT, registry.CUDNN, registry.FLASH}


def lowered(family: Family) -> tuple[GraphModule, Any]:
    """Torch-TensorRT's own lowering of the family's program, the caller's own copy, and the settings."""
    graph, settings = _lowered(family)
    return copy.deepcopy(graph), settings


@functools.cache
def _lowered(family: Family) -> tuple[GraphModule, Any]:
    torch_tensorrt = passes.load_torch_tensorrt()
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    device = torch_tensorrt.Device(gpu_id=0)
    settings = torch_tensorrt.dynamo.CompilationSettings(device=device, disable_tf32=True, immutable_weights=True)
    with quiet(), torch.no_grad():
        program = pre_export_lowering(exported(family), settings).run_decompositions(get_decompositions())
        return post_lowering(program.module(), settings), settings


def network(family: Family, graph: GraphModule, settings: Any) -> Network:
    """What Torch-TensorRT's interpreter makes of the graph, with our converter in its registry."""
    from torch_tensorrt.dynamo.conversion import TRTInterpreter

    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    sizes = [lengths(family), lengths(family, longest=True)]
    least = (1 if family.lengths == "one" else 2, 2) if family.dynamic else sizes[0]
    shapes = [inputs(family, *each) for each in (least, *sizes)]
    specs = [
        _spec(name, *each, dynamic=family.dynamic) for name, each in zip(names, zip(*shapes, strict=True), strict=True)
    ]
    with quiet(), torch.no_grad(), passes.native_attention():
        interpreter = TRTInterpreter(graph, specs, compilation_settings=settings)
        assert interpreter.validate_conversion() == set()
        Interpreter.run(interpreter)
    return Network(interpreter, (), Engine(0, 0, 0, 0, None, 0))  # what is in it is asked of its layers


def _spec(name: str, least: Tensor, now: Tensor, most: Tensor, dynamic: bool) -> Any:
    made = passes.load_torch_tensorrt().Input
    if not dynamic or least.shape == most.shape:
        return made(shape=tuple(now.shape), dtype=now.dtype, name=name)
    shapes = {f"{which}_shape": tuple(each.shape) for which, each in (("min", least), ("opt", now), ("max", most))}
    return made(**shapes, dtype=now.dtype, name=name)


def layers(made: Network) -> list[Any]:
    kind = load_stack().trt.LayerType.ATTENTION_INPUT
    return [layer for layer in every_layer(made) if layer.type == kind]


def every_layer(made: Network) -> list[Any]:
    net = made.interpreter.ctx.net
    return [net.get_layer(i) for i in range(net.num_layers)]


IN_CI = ("float16, static, same", "float16, dynamic, one")
"""Each takes half a minute; the others are ``slow``, and run on a GPU."""
EVERY = [
    pytest.param(family, id=str(family), marks=[] if str(family) in IN_CI else [pytest.mark.slow])
    for family in FAMILIES
]


def test_there_are_150_calls_and_more() -> None:
    assert sum(len(list(cases(family))) for family in FAMILIES) >= 150


@pytest.mark.parametrize("family", EVERY)
def test_every_call_becomes_a_native_layer_with_its_mask_and_the_engine_is_built(family: Family) -> None:
    graph, settings = lowered(family)
    calls = [node for node in graph.graph.nodes if node.target in CALLS]
    assert len(calls) == len(list(cases(family))) and all(registry.takes(node) for node in calls)

    made = network(family, graph, settings)

    masked = [layer.num_inputs > 3 and layer.get_input(3) is not None for layer in layers(made)]
    assert masked == [case.mask not in ("none", "causal") for case in cases(family)]
    assert sum(layer.name.endswith("[scaled query]") for layer in every_layer(made)) == len(masked)
    assert build_engine(load_stack(), made, lambda *_: True).engine.bytes > 10_000


def as_kernels(graph: GraphModule, target: Any) -> int:
    """Put ``target``, a kernel that torch makes of attention on a GPU, in the place of every call of ``graph`` that has
    such a form; returns of how many."""
    changed = 0
    for node in list(graph.graph.nodes):
        if node.target is not registry.SDPA or node.kwargs.get("enable_gqa"):
            continue
        mask, causal, scale = asked(node, node.args, node.kwargs)
        added = mask is not None and mask.meta["val"].dtype.is_floating_point and mask.meta["val"].dim() == 4
        if mask is not None and not (added and target is not registry.FLASH):
            continue
        rest = (causal != "none",) if target is registry.FLASH else (mask, False, 0.0, causal != "none")
        with graph.graph.inserting_before(node):
            if target is registry.FLASH:
                call = graph.graph.call_function(target, (*node.args[:3], 0.0, *rest), {"scale": scale})
            else:
                call = graph.graph.call_function(target, (*node.args[:3], *rest), {"scale": scale})
            result = graph.graph.call_function(operator.getitem, (call, 0))
        result.meta["val"] = node.meta["val"]
        call.meta["val"] = (node.meta["val"],)
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
        changed += 1
    graph.recompile()
    return changed


@pytest.mark.parametrize("target", [registry.EFFICIENT, registry.CUDNN, registry.FLASH], ids=str)
def test_the_kernels_that_torch_makes_of_attention_are_converted_too(target: Any) -> None:
    family = FAMILIES[0]
    graph, settings = lowered(family)
    changed = as_kernels(graph, target)
    assert changed >= (2 if target is registry.FLASH else 4)

    made = layers(network(family, graph, settings))

    assert len(made) == len(list(cases(family)))


def test_a_call_that_the_layer_does_not_take_is_left_to_the_others() -> None:
    x = torch.zeros(2, 4, 8, 16)
    refused: dict[str, Any] = {
        "without a batch": lambda q: sdpa(q[0], q[0], q[0]),
        "another batch": lambda q: sdpa(q, q[:1], q[:1]),
        "values of another number of heads": lambda q: sdpa(q, q[:, :2], q[:, :1], enable_gqa=True),
    }
    taken = {"full": lambda q: sdpa(q, q, q), "causal": lambda q: sdpa(q, q, q, is_causal=True)}

    def takes(function: Any) -> bool:
        with torch.no_grad():
            (call,) = (n for n in export(Function(function), (x,)).graph.nodes if n.target in CALLS)
        return registry.takes(call)

    assert all(takes(function) for function in taken.values())
    assert [name for name, function in refused.items() if takes(function)] == []


def test_the_registry_is_as_it_was_when_the_block_ends() -> None:
    load_stack()
    from torch_tensorrt.dynamo.conversion import DYNAMO_ATEN_CONVERTERS

    before = {target: list(DYNAMO_ATEN_CONVERTERS.get(target, [])) for target in CALLS}
    with passes.native_attention():
        assert all(len(DYNAMO_ATEN_CONVERTERS[target]) == len(before[target]) + 1 for target in CALLS)
    with pytest.raises(ZeroDivisionError), passes.native_attention():
        raise ZeroDivisionError
    assert {target: list(DYNAMO_ATEN_CONVERTERS.get(target, [])) for target in CALLS} == before


# On a GPU: what the engines say, judged by what PyTorch itself says in that type


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_engine_gives_what_pytorch_gives(family: Family) -> None:
    graph, settings = lowered(family)
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    session = Session(load_stack(), build_engine(load_stack(), network(family, graph, settings), lambda *_: True).data)
    for now in (lengths(family), lengths(family, longest=True))[: 2 if family.dynamic else 1]:
        given = [each.cuda() for each in inputs(family, *now, seed=1)]
        session.fit({name: tuple(each.shape) for name, each in zip(names, given, strict=True)})
        bound = dict(zip(names, given, strict=True))
        for output in session.outputs:
            bound[output] = torch.full(session.shape(output), torch.nan, dtype=session.dtype(output), device="cuda")
        session.bind(bound)
        session.run(torch.cuda.current_stream())
        torch.cuda.synchronize()
        here = [each.cpu() for each in given]  # not every mask suits every one of the GPU's kernels
        wide = [each.double() if each.is_floating_point() else each for each in here]
        truth, own = (Calls(family)(*tensors) for tensors in (wide, here))
        wrong = [
            f"{case}: {float(error):.2g} where {float(allowed):.2g} is allowed"
            for case, wanted, had, output in zip(cases(family), truth, own, session.outputs, strict=True)
            for error, allowed in [_errors(wanted, had, bound[output].cpu(), family.dtype)]
            if not error <= allowed
        ]
        assert not wrong, "\n".join(wrong)


def _errors(truth: Tensor, own: Tensor, got: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest error of ``got``, and FACTOR times PyTorch's own in that type; TensorRT-RTX multiplies fp32 in TF32
    (11 bits) and adds fp16 up in fp16, so a unit roundoff of that is allowed for each of the few terms of a sum."""
    unit = 2**-11 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    allowed = FACTOR * torch.maximum((own.double() - truth).abs().max(), 4 * unit * truth.abs().max())
    return (got.double() - truth).abs().max(), allowed
