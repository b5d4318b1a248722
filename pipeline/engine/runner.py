"""Runs an engine: device buffers, one stream, and where asked for a CUDA graph; greedy generation on top.

:class:`Engine` is what the verification calls, what the benchmark measures and what
:func:`load_engine` gives back from MLflow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from passes.errors import UserError
from passes.tensorrt.versions import Stack, load_stack
from pipeline.engine import guard
from pipeline.engine.session import Session
from pipeline.generate.protocol import captured, chat_tokens, greedy
from pipeline.host.files import draft, write_text
from pipeline.trace.call_form import InputSpec, make_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.trace.cached_forms import CacheShape


class Engine:
    """An engine on the current CUDA device.  Inputs int64 [batch, length]; output logits [batch, 1 or length, V].

    ``conditions``: what every call checks of its inputs first, see :mod:`pipeline.engine.guard`.
    ``runtime_cache``: file of the kernels that were compiled before, see :meth:`Session.keep_kernels`.
    """

    def __init__(
        self,
        stack: Stack,
        data: Any,
        inputs: tuple[InputSpec, ...],
        cuda_graph: bool = False,
        conditions: tuple[str, ...] = (),
        runtime_cache: Path | None = None,
    ) -> None:
        self.inputs = inputs
        self.cuda_graph = cuda_graph
        self.conditions = conditions
        self.generation = 0
        self.stream = torch.cuda.Stream()
        self.session = Session(stack, data, runtime_cache)
        self.keep_kernels = self.session.keep_kernels
        (self._output,) = self.session.outputs
        self._buffers: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, tokens: Tensor) -> None:
        """Allocate and bind everything for ``tokens`` [batch, length] int64, which the inputs hold without padding."""
        self._bind(make_inputs([spec.name for spec in self.inputs], tokens))

    def _bind(self, inputs: dict[str, Tensor]) -> None:
        self.generation += 1
        self._graph = None
        self._buffers = {}
        shapes = {spec.name: tuple(inputs[spec.name].shape) for spec in self.inputs}
        if not self.session.fit(shapes):
            first = self.inputs[0]
            raise UserError(
                f"{first.name} {shapes[first.name]}: outside the engine's profile, "
                f"batch {first.batch} and length {first.min}..{first.max}"
            )
        for name in shapes:
            self._buffers[name] = inputs[name].to(device="cuda", dtype=torch.int64).contiguous().clone()
        # Poisoned: an element that the engine does not write is seen as NaN.
        shape, dtype = self.session.shape(self._output), self.session.dtype(self._output)
        self._buffers[self._output] = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        self.session.bind(self._buffers)
        torch.cuda.current_stream().synchronize()
        self._execute()  # the first pass at a shape compiles kernels
        self.stream.synchronize()
        if self.cuda_graph:
            self._graph = captured(self.stream, self._execute)

    def _execute(self) -> None:
        self.session.run(self.stream)

    def enqueue(self) -> None:
        """Launch one forward pass over the bound buffers; waits for nothing."""
        if self._graph is None:
            self._execute()
        else:
            self._graph.replay()

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [batch, 1 or length, vocabulary] for ``inputs``, each [batch, length] int64.

        Raises :class:`RunError` of kind ``assumption``, and runs nothing, where they break one of the conditions.
        """
        guard.check(self.conditions, inputs)
        return self.unguarded(inputs)

    def unguarded(self, inputs: dict[str, Tensor]) -> Tensor:
        """The same without the check: what the verification calls, to see what breaking a condition costs."""
        bound = self._buffers.get(self.inputs[0].name)
        if bound is None or bound.shape != inputs[self.inputs[0].name].shape:
            self._bind(inputs)
        for spec in self.inputs:
            self._buffers[spec.name].copy_(inputs[spec.name])
        self._buffers[self._output].fill_(float("nan"))
        torch.cuda.current_stream().synchronize()
        with torch.cuda.stream(self.stream):
            self.enqueue()
        self.stream.synchronize()
        return self._buffers[self._output].clone()

    def answer(self, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int = 64) -> str:
        """The model's greedy answer to a chat question (a plain continuation where the tokenizer has no chat form)."""
        first = self.inputs[0]
        if first.batch != 1 or not first.dynamic:
            raise UserError("answer: needs an engine with a dynamic length and batch 1 (shape=dynamic)")
        names, stop = [spec.name for spec in self.inputs], frozenset({tokenizer.eos_token_id} - {None})
        tokens = greedy(self, names, chat_tokens(tokenizer, question).cuda(), max_new_tokens, stop, first.max)
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def write_engine(
    folder: Path,
    data: Any,
    section: dict[str, Any],
    inputs: tuple[InputSpec, ...],
    environment: dict[str, Any],
    assumed: Collection[str] = (),
    guarded: bool = True,
    cache: CacheShape | None = None,
) -> None:
    """The engine's file, ``engine.trt`` or ``decode.trt``, and beside it its manifest (``.json``): hash, inputs with
    their ranges, KV cache, target and versions, the conditions under which masks were dropped, and whether
    :func:`open_engine` has them checked."""
    with draft(folder / section["file"]) as part:
        part.write_bytes(data)
    manifest = {
        "schema": 1,
        "file": section["file"],
        "bytes": section["bytes"],
        "sha256": section["sha256"],
        "target": section["target"],
        "inputs": [asdict(spec) | {"shape": spec.sizes or ["batch", "length"]} for spec in inputs],
        "cache": None if cache is None else asdict(cache) | {"dtype": str(cache.dtype).removeprefix("torch.")},
        "outputs": [{"name": "output0", "shape": ["batch", "1 or length", "vocabulary"]}],
        "assumed": list(assumed),
        "guard": guarded,
        "environment": environment,
    }
    write_text((folder / section["file"]).with_suffix(".json"), json.dumps(manifest, indent=2) + "\n")


def read_engine(path: Path) -> tuple[dict[str, Any], bytes]:
    """The manifest beside the engine file ``path``, and its bytes; raises :class:`UserError` if its hash is another."""
    manifest_path = path.with_suffix(".json")
    try:
        manifest, data = json.loads(manifest_path.read_text()), path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: not there; an engine is {path.name} with {manifest_path.name} beside it"
        ) from None
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise UserError(f"{path.name}: its sha256 is not the manifest's; the file was changed or cut off")
    return manifest, data


def check_target(path: Path, manifest: dict[str, Any]) -> None:
    """Raises :class:`UserError` where the engine cannot run here: it is of another TensorRT, or for another GPU."""
    made, here = manifest["environment"], load_stack().versions()
    if any(made.get(key) != here[key] for key in ("flavour", "tensorrt")):
        raise UserError(
            f"{path.name}: was built by {made.get('flavour')} {made.get('tensorrt')}, and this is {here['flavour']} "
            f"{here['tensorrt']}; build it again"
        )
    if not torch.cuda.is_available():
        raise UserError(f"{path.name}: running an engine needs an NVIDIA GPU, and there is none")
    gpu = torch.cuda.get_device_name()
    if made.get("gpu") not in (None, gpu):  # None: built ahead of time, for several
        raise UserError(f"{path.name}: was built for {made['gpu']}, and this is {gpu}; build it again")


def open_engine(path: Path, cuda_graph: bool = False, runtime_cache: Path | None = None) -> Engine:
    """The engine file ``path`` with the manifest beside it; raises :class:`UserError` if its hash is another."""
    manifest, data = read_engine(path)
    conditions = guard.guarded(manifest)
    if manifest.get("cache"):
        raise UserError(f"{path.name}: fills a KV cache; it generates together with decode.trt (open_generator)")
    check_target(path, manifest)
    inputs = tuple(map(InputSpec.of, manifest["inputs"]))
    return Engine(load_stack(), data, inputs, cuda_graph, conditions, runtime_cache)


def load_engine(run_id: str, uri: str = "sqlite:///mlflow.db") -> Engine:
    """The verified engine of an MLflow run, its hash checked before anything else looks at it."""
    from pipeline.tracking.runs import fetch_engine

    return open_engine(fetch_engine(run_id, uri))
