"""A run's programs for those who have none of this project's code, as files that ``torch.export.load`` reads.

``engine.pt2`` holds the engine's bytes, in the form in which Torch-TensorRT saves an engine: torch and Torch-TensorRT
run it, on the GPU that it was built for.  ``graph.pt2`` is the rewritten graph in torch's own operations: torch runs it
anywhere.  Both are called as the model was when it was traced.  With a KV cache there is a second pair, ``decode.pt2``
and ``decode_graph.pt2``, for the tokens after the prompt; caches go in and come out as tensors, and where the engine
updates them in place (``cache=in_engine``) what comes out is what went in.

Nothing here runs or loads an engine, so none of it needs a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx import Graph, GraphModule, Node

from passes.graph.rewrite import in_aten
from passes.private import of_torch, of_torch_tensorrt
from passes.tensorrt.versions import Stack, device_stood_in, quiet
from pipeline.engine.file import read_engine
from pipeline.engine.programs import Program
from pipeline.engine.sections import Export, ExportedFile
from pipeline.host.files import draft, sha256_of

MANIFEST = "manifest.json"
"""The engine's manifest (:mod:`pipeline.engine.file`) in the file, for ``torch.export.load(…, extra_files=…)``."""
PICKLE_PROTOCOL = 4
"""Torch-TensorRT's default of 2 holds no engine above 4 GiB."""


def export(folder: Path, programs: dict[str, Program], stack: Stack, executed: str) -> Export:
    """Write what the engines in ``folder`` and the programs that they were made from are for others.

    ``executed``: which of them the verification ran, ``engine`` or ``graph``.
    """
    files, not_written = {}, {}
    for name, each in programs.items():
        manifest, data = read_engine(folder / f"{name}.trt")
        path = folder / f"{name}.pt2"
        write_engine(path, data, manifest, each.program, stack)
        files[path.name] = _described(path, ("torch", "torch_tensorrt"), manifest["target"], executed == "engine")
        del data  # gigabytes of a large model
        path = folder / ("graph.pt2" if name == "engine" else f"{name}_graph.pt2")
        plain = in_aten(each.program)
        if foreign := foreign_operations(plain):
            not_written[path.name] = f"torch alone has no {', '.join(foreign)}, which the graph needs"
            continue
        write_graph(path, plain)
        files[path.name] = _described(path, ("torch",), None, executed == "graph")
    return Export(files, not_written)


def notes(written: Export, assumed: Collection[str]) -> Iterator[str]:
    """What the reader must know of what was ``written``; ``assumed``: on the word of which conditions masks were
    dropped."""
    yield from (f"{file}: not written: {why}" for file, why in written.not_written.items())
    if assumed:
        yield f"nothing in {', '.join(written.files)} checks that {', '.join(assumed)} holds"


def _described(path: Path, needs: tuple[str, ...], target: str | None, executed: bool) -> ExportedFile:
    return ExportedFile(path.stat().st_size, sha256_of(path), needs, target, executed)


def foreign_operations(program: ExportedProgram) -> list[str]:
    """The operations of ``program`` that libraries other than torch define."""
    operations = {node.target for node in program.graph.nodes if isinstance(node.target, of_torch.Operation)}
    return sorted(str(each) for each in operations if each.namespace not in ("aten", "prim", "prims"))


def write_graph(path: Path, program: ExportedProgram) -> None:
    """``program`` with its weights, on the CPU: ``move_to_device_pass`` of torch takes it to another device."""
    with quiet(), torch.no_grad(), draft(path) as part:
        if any(tensor.is_cuda for tensor in (*program.state_dict.values(), *program.constants.values())):
            program = move_to_device_pass(program, "cpu")
        torch.export.save(program, part)


def write_engine(path: Path, data: bytes, manifest: dict[str, Any], program: ExportedProgram, stack: Stack) -> None:
    """The engine ``data`` as a program that is called as ``program`` is, which it was built from."""
    ahead_of_time = manifest["environment"].get("gpu") is None
    with quiet(), device_stood_in(), draft(path) as part:
        settings = stack.torch_tensorrt.dynamo.CompilationSettings(
            device=stack.torch_tensorrt.Device(gpu_id=0),
            lazy_engine_init=True,
            hardware_compatible=ahead_of_time,  # else Torch-TensorRT wants the compute capability that is named in it
        )
        graph = _around(data, _inputs(data, manifest, stack), program, settings)
        extra = {MANIFEST: json.dumps(manifest)}
        stack.torch_tensorrt.save(graph, str(part), extra_files=extra, retrace=False, pickle_protocol=PICKLE_PROTOCOL)


def _inputs(data: bytes, manifest: dict[str, Any], stack: Stack) -> dict[str, bool]:
    """The inputs of the program, in its order, and whether the engine has them: as it says itself where a GPU can load
    it, else as the network said that it was built from."""
    if not torch.cuda.is_available():
        return {spec["name"]: spec["read"] for spec in manifest["inputs"]}
    runtime = stack.trt.Runtime(stack.torch_tensorrt.logging.TRT_LOGGER)
    engine = runtime.deserialize_cuda_engine(data)
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    return {spec["name"]: spec["name"] in names for spec in manifest["inputs"]}


def _around(data: bytes, inputs: dict[str, bool], program: ExportedProgram, settings: Any) -> GraphModule:
    """The engine ``data`` alone in a graph that takes and gives what ``program`` does.

    ``inputs``: the engine's names of them, in the order of the program's arguments, and whether it has them.
    """
    graph, given = Graph(), program.graph_signature.user_inputs
    taken = [_copied(graph, node) for node in program.graph.find_nodes(op="placeholder") if node.name in given]
    read = {name: node for (name, has), node in zip(inputs.items(), taken, strict=True) if has}
    made = [node.meta["val"] for node in program.graph.output_node().args[0]]
    names = [f"output{i}" for i in range(len(made))]
    shapes = {
        "inputs": [_shape(node.meta["val"]) for node in read.values()],
        "outputs": [_shape(value) for value in made],
    }

    root = nn.Module()
    root.add_module(of_torch_tensorrt.ENGINE, of_torch_tensorrt.engine_module(data, [*read], names, shapes, settings))
    call = graph.call_module(of_torch_tensorrt.ENGINE, tuple(read.values()))
    call.meta["val"] = tuple(made)
    several = len(made) > 1  # of a single one Torch-TensorRT makes the same itself
    graph.output(tuple(graph.call_function(getitem, (call, i)) for i in range(len(made))) if several else (call,))
    of_torch.called_as(graph, program)
    return GraphModule(root, graph)


def _copied(graph: Graph, placeholder: Node) -> Node:
    copy = graph.placeholder(placeholder.name)
    copy.meta["val"] = placeholder.meta["val"]
    return copy


def _shape(tensor: Tensor) -> dict[str, Any]:
    """Sizes, numbers or sympy's expressions of those of the inputs, and type."""
    sizes = [size.node.expr if isinstance(size, torch.SymInt) else size for size in tensor.shape]
    return {"shape_exprs": sizes, "dtype": tensor.dtype}
