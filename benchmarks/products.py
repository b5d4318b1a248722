"""The products of a prompt: which kernels TensorRT takes for one length and for a range, and by how weights lie.

``python -m benchmarks.products > products.jsonl`` prints the environment and one JSON row a case, a chain of two MLPs
of a model's layers over ``LENGTH`` rows of fp16.  Forms: ``out x in`` has weights as a linear layer has them,
``in x out`` turned; ``turned rows`` multiplies weights as they are with the rows turned, so that what gate and up give
lies the other way round.  Lengths: a network of that length alone (``static``), a profile for that length (``exact``),
one from 2 to it (``range``).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.kernel_forms import SIZES, Net
from benchmarks.kernels import kernel_times
from passes.tensorrt.versions import load_stack
from pipeline.record.environment import environment

LENGTH, CHAIN = 2048, 2
FORMS = ("out x in", "in x out", "turned rows")
LENGTHS = {"static": None, "exact": (LENGTH, LENGTH, LENGTH), "range": (2, LENGTH, LENGTH)}
"""The least, best and longest of the profile, where there is one."""
SPECIALISED = 1.0
"""Seconds that TensorRT-RTX gets to compile the kernels of the length that it saw."""
ROUNDS = 40


def weights(model: str) -> list[np.ndarray]:
    """gate and up [inner, hidden], down [hidden, inner]."""
    hidden, _, _, inner, _ = SIZES[model]
    draw = np.random.default_rng(0)
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    return [(draw.standard_normal(shape, np.float32) * 0.02).astype(np.float16) for shape in shapes]


def build(model: str, form: str, lengths: str) -> bytes:
    net, profile, hidden = Net(), LENGTHS[lengths], SIZES[model][0]
    x = first = net.input("x", (1, LENGTH if profile is None else -1, hidden))

    def times(rows: Any, weight: np.ndarray) -> Any:
        if form == "in x out":
            return net.matmul(rows, net.const(weight.T[None]))
        return net.matmul(rows, net.const(weight[None]), tb=True)

    for _ in range(CHAIN):
        gate, up, down = weights(model)
        if form == "turned rows":
            g, u = (net.matmul(net.const(weight[None]), x, tb=True) for weight in (gate, up))
        else:
            g, u = times(x, gate), times(x, up)
        g = net.binary(g, net.net.add_activation(g, net.trt.ActivationType.SIGMOID).get_output(0), "PROD")
        h = net.binary(g, u, "PROD")
        out = net.matmul(h, net.const(down.T[None]), ta=True) if form == "turned rows" else times(h, down)
        x = net.binary(x, out)
    net.output(net.binary(x, first), "out")
    return net.build() if profile is None else net.build([("x", [(1, n, hidden) for n in profile])])


def wanted(model: str, x: torch.Tensor) -> torch.Tensor:
    """In fp32, on the GPU."""
    y = x.float()
    gate, up, down = (torch.from_numpy(weight).cuda().float().T for weight in weights(model))
    for _ in range(CHAIN):
        y = y + (torch.nn.functional.silu(y @ gate) * (y @ up)) @ down
    return y + x.float()


def row_of(model: str, form: str, lengths: str) -> dict[str, Any]:
    stack, stream = load_stack(), torch.cuda.Stream()
    data = build(model, form, lengths)
    engine = stack.trt.Runtime(stack.torch_tensorrt.logging.TRT_LOGGER).deserialize_cuda_engine(data)
    context = engine.create_execution_context()
    x = torch.randn(1, LENGTH, SIZES[model][0], generator=torch.Generator().manual_seed(0)).half().cuda()
    out = torch.full_like(x, float("nan"))
    context.set_input_shape("x", tuple(x.shape))
    for name, tensor in {"x": x, "out": out}.items():
        context.set_tensor_address(name, tensor.data_ptr())
    torch.cuda.synchronize()
    launch = partial(context.execute_async_v3, stream.cuda_stream)
    launch()
    stream.synchronize()
    right = wanted(model, x)
    error = float((out.float() - right).norm() / right.norm())
    time.sleep(SPECIALISED)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    with torch.cuda.stream(stream):
        for begin, end in marks:
            begin.record()
            launch()
            end.record()
    stream.synchronize()
    us = float(np.median([begin.elapsed_time(end) * 1e3 for begin, end in marks[ROUNDS // 4 :]])) / CHAIN
    kernels = [kernel for kernel in kernel_times(launch) if kernel[2] > 0]
    return {"model": model, "form": form, "lengths": lengths, "us": us, "relative_error": error, "kernels": kernels}


def main() -> int:
    print(json.dumps({"environment": asdict(environment(load_stack().versions()))}), flush=True)
    for model in SIZES:
        for lengths in LENGTHS:
            for form in FORMS:
                print(json.dumps(row_of(model, form, lengths)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
