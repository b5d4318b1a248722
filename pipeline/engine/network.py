"""The ``lower`` and ``interpret`` stages: a rewritten program becomes a TensorRT network.

Torch-TensorRT lowers the graph and converts it, with our converters before its own in its registry
(:mod:`passes.tensorrt.registry`). The whole graph becomes one engine: an op that TensorRT cannot take ends the run, it
never falls back to torch. Everything here works without a GPU; that is why the interpreter's own ``run()``, which also
builds and deserialises, is not used but what it inherits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from operator import getitem
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from passes.errors import AS_IT_IS, RunError, first_line, message_line
from passes.graph import driver
from passes.graph.driver import Pass
from passes.graph.rewrite import DECOMPOSITIONS, without_evidence
from passes.precision import PRECISIONS
from passes.private.of_torch_tensorrt import builder_config, left_unfolded
from passes.proof.calls import FORMS
from passes.quantised import DEQUANTISED, WITHOUT_FEW_BITS
from passes.tensorrt import attention as converters
from passes.tensorrt import cache, few_bits, local_attention, rows
from passes.tensorrt import missing as missing_converters
from passes.tensorrt.fused_kernels import FusedKernels, of_this_process
from passes.tensorrt.network_passes import PASSES
from passes.tensorrt.registry import Converter, registered
from passes.tensorrt.versions import Stack, quiet, tensorrt_errors
from pipeline.config.schema import BackendConfig
from pipeline.engine import profiles, unfused
from pipeline.engine.sections import Engine
from pipeline.trace.call_form import InputSpec
from pipeline.trace.largest import refuse_larger


@dataclass(frozen=True)
class Lowered:
    graph: GraphModule
    settings: Any
    inputs: tuple[InputSpec, ...]


@dataclass(frozen=True)
class Network:
    """A TensorRT network and what is in it, read from it."""

    interpreter: Any
    native_layers: tuple[converters.NativeLayer, ...]
    contents: Engine
    configure: Callable[[Any], Any] = builder_config
    """Makes the builder's configuration, of the interpreter."""


def lower(
    stack: Stack,
    program: ExportedProgram,
    inputs: tuple[InputSpec, ...],
    backend: BackendConfig,
    precision: str,
    few_bits: bool = True,
) -> Lowered:
    """Torch-TensorRT's own lowering, with attention kept whole for the converter; raises :class:`RunError` of kind
    ``lowering`` where it cannot, and of kind ``too_large`` for a tensor beyond its indices.

    ``precision``: of the numbers.  ``few_bits``: quantised weights stay so; else the engine holds the same weights in
    ``precision``.
    """
    refuse_larger(program)
    dynamo = stack.torch_tensorrt.dynamo
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    settings = dynamo.CompilationSettings(
        device=stack.torch_tensorrt.Device(gpu_id=0),  # the default asks CUDA
        disable_tf32=PRECISIONS[precision].is_full,
        optimization_level=backend.optimization_level,
        workspace_size=int((backend.workspace_gib or 0) * 2**30),
        max_aux_streams=backend.aux_streams,
        immutable_weights=True,
    )
    with quiet(), torch.no_grad(), left_unfolded(DEQUANTISED):
        table = {**get_decompositions(), **DECOMPOSITIONS, **({} if few_bits else WITHOUT_FEW_BITS)}
        try:
            program = pre_export_lowering(program, settings)
            graph = post_lowering(without_evidence(program.run_decompositions(table)).module(), settings)
        except (RunError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RunError("lowering", f"Torch-TensorRT cannot lower it ({first_line(error)}); {AS_IT_IS}") from error
    return Lowered(graph, settings, inputs)


@dataclass(frozen=True)
class Conversion:
    """What of ours takes part where a graph becomes a network."""

    passes: tuple[Pass[GraphModule], ...]
    converters: Callable[[Stack, list[converters.NativeLayer]], list[Converter]]
    """Ours; the native layers that they make go into the list."""
    kernels: FusedKernels = field(default_factory=FusedKernels)
    """What is known of TensorRT's fused attention kernels."""


ROWS = ("write_squares", "fuse_rows", "join_queries_and_keys")
"""What ``backend.fused_rows=false`` leaves out."""
UPSTREAM = Conversion((), lambda stack, made: [])
"""Nothing: what the installed Torch-TensorRT does by itself."""


def ours(in_place: bool = False, without: Collection[str] = (), kernels: FusedKernels | None = None) -> Conversion:
    """All that we have, but for the optional passes in ``without``; ``in_place``: a KV cache is updated where it is."""
    known = kernels or of_this_process()
    chosen = tuple(each for each in PASSES if not (each.optional and each.name in without))
    fused_rows = any(each.name == "fuse_rows" for each in chosen)
    return Conversion(chosen, lambda stack, made: _converters(stack, made, in_place, fused_rows, known), known)


def interpret(stack: Stack, lowered: Lowered, conversion: Conversion) -> Network:
    """Convert the lowered graph, op by op, to a TensorRT network."""
    done = driver.run(conversion.passes, lowered.graph, lambda graph: graph)
    made: list[converters.NativeLayer] = []
    ours = conversion.converters(stack, made)
    specs = [_trt_input(stack, spec) for spec in lowered.inputs]
    from torch_tensorrt.dynamo.conversion import TRTInterpreter

    with quiet(), torch.no_grad(), tensorrt_errors() as errors, registered(*ours):
        interpreter = TRTInterpreter(lowered.graph, specs, compilation_settings=lowered.settings)
        _refuse_what_is_missing(lowered.graph)
        try:
            Interpreter.run(interpreter)
        except (RunError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = message_line(errors[0]) if errors else first_line(error)
            at = _place(interpreter.ctx.current_node)
            raise RunError("conversion", f"TensorRT refuses {at} ({reason}); {AS_IT_IS}") from error
    calls = [node for node in lowered.graph.graph.nodes if node.target in (*FORMS, *converters.CONVERTED)]
    contents = replace(_contents(stack, interpreter.ctx.net, made, calls), passes=tuple(done))
    configure = conversion.kernels.configure
    if missing := unfused.unfused(made):
        notes = unfused.notes(missing, len(made), target(configure(interpreter)))
        contents = replace(contents, unfused=missing, notes=tuple(notes))
    return Network(interpreter, tuple(made), contents, configure)


def target(config: Any) -> str:
    """What is built for with the builder's ``config``: this GPU, or, ahead of time, the compute capabilities that were
    asked for."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    asked = [config.get_compute_capability(i).name for i in range(getattr(config, "num_compute_capabilities", 0))]
    return f"ahead of time, {', '.join(asked) if asked else 'TensorRT-RTX default targets'}"


def _refuse_what_is_missing(graph: GraphModule) -> None:
    """Raise :class:`RunError` where an operation of ``graph`` has no converter in Torch-TensorRT's registry."""
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS

    missing = [node for node in graph.graph.nodes if node.op.startswith("call") and node not in DYNAMO_CONVERTERS]
    missing = [node for node in missing if node.target is not getitem] or missing  # of one that gives several tensors
    if missing:
        first = {DYNAMO_CONVERTERS.qualified_name_or_str(n.target).removeprefix("torch.ops."): n for n in missing[::-1]}
        names = sorted(first)
        at = _place(first[names[0]])
        raise RunError("unsupported_op", f"TensorRT has no layer for {', '.join(names)} ({at}); {AS_IT_IS}")


def _place(node: Node | None) -> str:
    """An operation, and the innermost module of the model that it was traced in."""
    if node is None:
        return "it"
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f"{node.name} in {stack[-1][0]}" if stack and stack[-1][0] else str(node.name)


def _trt_input(stack: Stack, spec: InputSpec) -> Any:
    dtype = getattr(torch, spec.dtype)
    if not spec.dynamic:
        return stack.torch_tensorrt.Input(shape=spec.shape(spec.max), dtype=dtype, name=spec.name)
    return stack.torch_tensorrt.Input(profiles=profiles.of(spec), dtype=dtype, name=spec.name)


def _converters(
    stack: Stack, made: list[converters.NativeLayer], in_place: bool, fused_rows: bool, kernels: FusedKernels
) -> list[Converter]:
    """Ours, with what they are to do in this network; ``made`` collects the native layers."""

    def attention(ctx: Any, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output, layer = converters.convert(stack, ctx, node, args, kwargs, kernels)
        made.append(layer)
        return output

    masks: local_attention.Masks = {}

    def local(ctx: Any, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output, layers = local_attention.convert(stack, ctx, node, args, kernels, masks)
        made.extend(layers)
        return output

    ours = [
        Converter(converters.CONVERTED, attention),
        Converter(local_attention.CONVERTED, local),
        Converter(cache.CONVERTED, lambda ctx, node, args, _: cache.convert(stack, ctx, node, args, in_place)),
        Converter(
            missing_converters.CONVERTED, lambda ctx, node, args, _: missing_converters.convert(stack, ctx, node, args)
        ),
    ]
    ours += few_bits.converters(stack)
    if fused_rows:
        ours.append(
            Converter((rows.LINEAR,), lambda ctx, node, args, _: rows.convert(stack, ctx, node, args), rows.applies)
        )
    return ours


def _contents(stack: Stack, network: Any, made: list[converters.NativeLayer], calls: list[Node]) -> Engine:
    """Counts read from the network, layer by layer."""
    kinds = stack.trt.LayerType
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    attention = [layer for layer in layers if layer.type == kinds.ATTENTION_INPUT]
    # Inputs of the entry layer: query, key, value, then the mask.
    masked = sum(sum(layer.get_input(i) is not None for i in range(layer.num_inputs)) > 3 for layer in attention)
    causal = sum(layer.causal != "none" for layer in made)
    if not made:  # upstream's converter: the causal flag can no longer be read, only what it was asked for
        causal = sum(bool(_asked_causal(node)) for node in calls)
    return Engine(
        layers=len(layers),
        iattention=len(attention),
        iattention_causal=causal,
        iattention_masked=masked,
        iattention_fused=sum(layer.fused for layer in made) if made else None,
        softmax=sum(layer.type == kinds.SOFTMAX for layer in layers),
        weights=_weights(layer.get_output(0) for layer in layers if layer.type == kinds.CONSTANT),
    )


def _weights(constants: Iterable[Any]) -> dict[str, int]:
    """Bytes of the network's ``constants``, by the name of TensorRT's type."""
    found: Counter[str] = Counter()
    for constant in constants:
        found[constant.dtype.name.lower()] += int(prod(constant.shape) * constant.dtype.itemsize)
    return dict(sorted(found.items()))


def _asked_causal(node: Node) -> Any:
    position = FORMS[node.target][1] if node.target in FORMS else None
    if position is not None and len(node.args) > position:
        return node.args[position]
    return node.kwargs.get("is_causal", False)
