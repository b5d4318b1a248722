"""What the front door is worth to a script that is not ours: a dynamic prompt through Torch-TensorRT, before and after.

``python -m benchmarks.drop_in MODEL... --to FILE`` needs a GPU.  One JSON line for each way: the script as it is
(``before``), with ``passes.rewrite`` in front of an unchanged ``torch_tensorrt.dynamo.compile`` (``rewrite``), that
with our converter (``native_attention``), ``rewrite`` with one argument more, a profile for the length that is timed
beside that for all lengths (``profiles``), and the script as it is after ``passes.register()`` (``register``).
``--logits last`` (what generation needs) or ``all``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import passes
from passes.tensorrt.versions import load_stack
from pipeline.__main__ import compose_config
from pipeline.measure.statistics import summarise
from pipeline.model.load import load
from pipeline.record.environment import environment

LENGTH, RUNS = 2048, 60
WARM_UP = 8.0
"""Seconds.  TensorRT-RTX compiles the kernels of a length behind the caller's back, and uses them when they are there
(Torch-TensorRT's default strategy, "lazy"); ``first_ms`` of a row is what its first passes took."""


class Logits(nn.Module):
    """What a script in the style of Torch-TensorRT's run_llm.py exports; ``kept``: of how many tokens, 0 is all."""

    def __init__(self, model: Any, kept: int) -> None:
        super().__init__()
        self.model = model
        self.kept = kept

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False, logits_to_keep=self.kept).logits


def program_of(form: nn.Module, device: str) -> ExportedProgram:
    tokens = torch.zeros(1, 16, dtype=torch.int64, device=device)
    with torch.no_grad():
        return export(form, (tokens,), dynamic_shapes=({1: Dim("length", min=2, max=LENGTH)},), strict=False)


RANGE = {"min_shape": (1, 2), "opt_shape": (1, LENGTH), "max_shape": (1, LENGTH)}
EXACT = dict.fromkeys(RANGE, (1, LENGTH))


def compiled(program: ExportedProgram, exact: bool = False) -> Callable[[Tensor], Tensor]:
    torch_tensorrt = passes.load_torch_tensorrt()
    shapes = {"profiles": [EXACT, RANGE]} if exact else RANGE  # Torch-TensorRT keeps to the first that fits
    inputs = [torch_tensorrt.Input(**shapes, dtype=torch.int64)]
    return torch_tensorrt.dynamo.compile(program, inputs=inputs, min_block_size=1)


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    passes.register()
    try:
        yield
    finally:
        passes.unregister()


WAYS: dict[str, tuple[Callable[[ExportedProgram], ExportedProgram], Callable[[], Any]]] = {
    "before": (lambda program: program, contextlib.nullcontext),
    "rewrite": (lambda program: passes.rewrite(program).program, contextlib.nullcontext),
    "native_attention": (lambda program: passes.rewrite(program).program, passes.native_attention),
    "profiles": (lambda program: passes.rewrite(program).program, contextlib.nullcontext),
    "register": (lambda program: program, _registered),
}


def measure(engine: Callable[[Tensor], Tensor], tokens: Tensor, runs: int = RUNS) -> list[float]:
    """Device time of each pass, ms."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    torch.cuda.synchronize()
    for begin, end in marks:
        begin.record()
        engine(tokens)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def rows(name: str, logits: str, ways: list[str], to: Path) -> None:
    config = compose_config([f"model={name}", "model.weights=random", "precision=fp16", "benchmark=none"])
    loaded = load(config.model, "fp16", torch.device("cuda"), 0, lambda _: None)
    form = Logits(loaded.model, {"last": 1, "all": 0}[logits]).eval()
    tokens = torch.randint(3, loaded.model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens = tokens.cuda()
    with torch.no_grad():
        truth = copy.deepcopy(form).float()(tokens).double()  # not in place: tables stay in fp32 on the way back
        own = error(form(tokens), truth)
    program = program_of(form, "cuda")
    for way in ways:
        change, context = WAYS[way]
        row: dict[str, Any] = {"model": name, "logits": logits, "way": way, "length": LENGTH}
        row["own_relative_error"] = own
        try:
            started = time.perf_counter()
            with context():
                engine = compiled(change(program), exact=way == "profiles")
            row["build_s"] = time.perf_counter() - started
            row["relative_error"] = error(engine(tokens), truth)
            row["first_ms"] = statistics.median(measure(engine, tokens, 10))
            until = time.perf_counter() + WARM_UP
            while time.perf_counter() < until:
                measure(engine, tokens, 10)
            row["device_ms"] = asdict(summarise(measure(engine, tokens)))
            del engine
        except Exception as failure:  # the other ways are still worth their time
            row["failure"] = f"{type(failure).__name__}: {str(failure)[:300]}"
        gc.collect()
        torch.cuda.empty_cache()
        row["environment"] = environment(load_stack().versions())
        line = json.dumps(row, default=vars)  # of dataclasses
        print(line, flush=True)
        with to.open("a") as file:
            file.write(line + "\n")


def error(got: Any, truth: Tensor) -> float:
    got = torch.utils._pytree.tree_leaves(got)[0].double()
    return float((got - truth).norm() / truth.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--logits", default="last", choices=["last", "all"])
    parser.add_argument("--to", type=Path, required=True)
    asked = parser.parse_args()
    for name in asked.models:
        rows(name, asked.logits, asked.ways, asked.to)


if __name__ == "__main__":
    main()
