"""Where the time of an engine goes, kernel by kernel: ``python -m benchmarks.profile_step RUN_FOLDER``.

Opens ``decode.trt`` and ``engine.trt`` of a run with a KV cache, runs each once over zeros (what they hold changes no
kernel), ``engine.trt`` over a prompt of ``shape.opt`` tokens, and writes ``decode-profile.json`` and
``engine-profile.json`` beside them: what they ran on; name, launches and microseconds of every kernel, the sum, the
time as a CUDA graph (null where the engine cannot be captured), and so what the launches cost between the kernels.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from passes.errors import RunError
from passes.tensorrt.versions import load_stack
from pipeline.engine.file import read_engine
from pipeline.engine.session import Session, captured
from pipeline.record.environment import environment


def profile(path: Path) -> dict[str, Any]:
    manifest, data = read_engine(path)
    session, stream = Session(load_stack(), data), torch.cuda.Stream()
    tensors = {
        spec["name"]: torch.zeros(
            spec["sizes"] or (spec["batch"], spec["opt"]), dtype=getattr(torch, spec["dtype"]), device="cuda"
        )
        for spec in manifest["inputs"]
    }
    caches = [tensor for name, tensor in tensors.items() if name.startswith(("keys_", "values_"))]
    session.fit({name: tuple(tensor.shape) for name, tensor in tensors.items() if name in session.names})
    for output in session.outputs:
        place = int(output.removeprefix("output"))
        fresh = torch.empty(session.shape(output), dtype=session.dtype(output), device="cuda")
        in_place = manifest["cache"]["mode"] == "in_engine" and place > 0
        tensors[output] = caches[place - 1] if in_place else fresh
    session.bind(tensors)
    torch.cuda.synchronize()
    session.run(stream)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        session.run(stream)
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    kernels = [
        {"name": e.key[:120], "launches": e.count, "us": e.self_device_time_total}
        for e in sorted(events, key=lambda e: -e.self_device_time_total)
    ]
    return {
        "environment": asdict(environment(load_stack().versions())),
        "step_us": graph_us(session, stream),
        "kernels_us": sum(kernel["us"] for kernel in kernels),
        "launches": sum(kernel["launches"] for kernel in kernels),
        "kernels": kernels,
    }


def graph_us(session: Session, stream: torch.cuda.Stream) -> float | None:
    """Median time of ``session`` as a CUDA graph, in microseconds; None where it cannot be one."""
    try:  # TensorRT-RTX 1.4 says of engines that can be captured that they cannot
        graph = captured(stream, partial(session.run, stream))
    except RunError:
        return None
    times = []
    with torch.cuda.stream(stream):
        for _ in range(50):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
    return float(np.median(times))


def main() -> int:
    for folder in map(Path, sys.argv[1:]):
        for part in ("decode", "engine"):
            found = profile(folder / f"{part}.trt")
            (folder / f"{part}-profile.json").write_text(json.dumps(found, indent=1) + "\n")
            print(
                f"{folder.name}, {part}: {found['step_us']} us as a CUDA graph, {found['launches']} kernels "
                f"{found['kernels_us']:.0f} us"
            )
            for kernel in found["kernels"][:12]:
                print(f"  {kernel['us']:8.1f} us {kernel['launches']:4d} x {kernel['name'][:90]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
