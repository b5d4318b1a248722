"""Products of a prompt's rows with weights: which kernels TensorRT takes for one length and for a range of lengths.

``python -m benchmarks.products > products.jsonl`` prints the environment and one JSON row a case: ``LENGTH`` rows of
fp16 times weights as a linear layer has them (``out x in``) or turned (``in x out``), as a network of that length alone
(``static``), by a profile for that length (``exact``) and by one from 2 to it (``range``).
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

from benchmarks.kernel_forms import Net
from benchmarks.kernels import kernel_times
from passes.tensorrt.versions import load_stack
from pipeline.record.environment import environment

LENGTH, INNER, OUT = 2048, 2048, 8192
LAYOUTS = ("out x in", "in x out")
LENGTHS = {"static": None, "exact": (LENGTH, LENGTH, LENGTH), "range": (2, LENGTH, LENGTH)}
"""The least, best and longest of the profile, where there is one."""
SPECIALISED = 1.0
"""Seconds that TensorRT-RTX gets to compile the kernels of the length that it saw."""
ROUNDS = 40


def weights() -> np.ndarray:
    """[out, in]."""
    return (np.random.default_rng(0).standard_normal((OUT, INNER), np.float32) * 0.02).astype(np.float16)


def build(layout: str, lengths: str) -> bytes:
    net, profile = Net(), LENGTHS[lengths]
    x = net.input("x", (1, LENGTH if profile is None else -1, INNER))
    weight = weights()
    y = net.matmul(x, net.const(weight[None] if layout == "out x in" else weight.T[None]), tb=layout == "out x in")
    net.output(y, "out")
    return net.build() if profile is None else net.build([("x", [(1, n, INNER) for n in profile])])


def row_of(layout: str, lengths: str) -> dict[str, Any]:
    stack, stream = load_stack(), torch.cuda.Stream()
    engine = stack.trt.Runtime(stack.torch_tensorrt.logging.TRT_LOGGER).deserialize_cuda_engine(build(layout, lengths))
    context = engine.create_execution_context()
    x = torch.randn(1, LENGTH, INNER, generator=torch.Generator().manual_seed(0)).half().cuda()
    out = torch.full((1, LENGTH, OUT), float("nan"), dtype=torch.float16, device="cuda")
    context.set_input_shape("x", tuple(x.shape))
    for name, tensor in {"x": x, "out": out}.items():
        context.set_tensor_address(name, tensor.data_ptr())
    torch.cuda.synchronize()
    launch = partial(context.execute_async_v3, stream.cuda_stream)
    launch()
    stream.synchronize()
    wanted = x.float() @ torch.from_numpy(weights()).cuda().float().T
    error = float((out.float() - wanted).norm() / wanted.norm())
    time.sleep(SPECIALISED)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    with torch.cuda.stream(stream):
        for begin, end in marks:
            begin.record()
            launch()
            end.record()
    stream.synchronize()
    us = float(np.median([begin.elapsed_time(end) * 1e3 for begin, end in marks[ROUNDS // 4 :]]))
    kernels = [kernel for kernel in kernel_times(launch) if kernel[2] > 0]
    return {"layout": layout, "lengths": lengths, "us": us, "relative_error": error, "kernels": kernels}


def main() -> int:
    print(json.dumps({"environment": asdict(environment(load_stack().versions()))}), flush=True)
    for lengths in LENGTHS:
        for layout in LAYOUTS:
            print(json.dumps(row_of(layout, lengths)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
