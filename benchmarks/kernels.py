"""The map behind the choice of decode kernels: every form of a layer, built alone, checked and timed.

``python -m benchmarks.kernels [attention] [linear] [step] --out FOLDER`` builds each case as a small network of
the installed TensorRT, runs it as a CUDA graph, compares it with PyTorch in fp32 and writes one JSON row a case.

*attention*: one query a head over ``keys`` cached keys, eight layers in a chain.  ``native`` is the attention layer
as it is; ``rows`` hands the query heads of a group over as the rows of one; ``folded`` keeps the mask in the keys,
as eight more channels (query 1, key 0 where it may be seen and far below where not); ``mask`` uses the mask input;
``matmul`` is the product written out.  *linear*: the products of a decoder layer at one row, in the forms that
compute the same.  *step*: whole decoder layers (:mod:`benchmarks.step_forms`).  Weights and caches are larger than the
L2 cache, so what is timed is memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kernel_forms import (
    ATTENTION,
    CHAIN,
    HEADS,
    KEYS,
    LINEAR,
    SIZES,
    Net,
    attention_inputs,
    attention_net,
    linear_inputs,
    linear_net,
    linear_weights,
)
from benchmarks.stacks import aged, caption, environment_of, rows_of
from benchmarks.step_forms import STEP, STEP_LAYERS, step_inputs, step_net
from passes.errors import first_line
from passes.tensorrt.versions import load_stack
from pipeline.engine.session import captured
from pipeline.record.environment import environment

KINDS: dict[str, tuple[Callable[..., Net], Callable[..., Any]]] = {
    "attention": (attention_net, attention_inputs),
    "linear": (linear_net, linear_inputs),
    "step": (step_net, step_inputs),
}
STEP_KEYS = 2176


def cases(kinds: list[str], models: list[str]) -> Iterator[tuple[str, str, str, Any]]:
    for model in models:
        if "attention" in kinds:
            yield from (("attention", model, form, keys) for form in ATTENTION for keys in KEYS)
        if "linear" in kinds and model in SIZES:
            yield from (("linear", model, form, part) for form in LINEAR for part in ("layers", "head"))
        if "step" in kinds and model in SIZES:
            yield from (("step", model, form, STEP_KEYS) for form in STEP)


def work(tasks: Any, rows: Any, turn: Any, build_only: bool) -> None:
    """Build, check and time cases of the queue ``tasks`` until it is empty; a case that fails is a row too.

    Cases are built side by side, and ``turn`` is held by the one that uses the GPU.
    """
    while True:
        try:
            case = tasks.get(timeout=1)
        except queue.Empty:
            return
        kind, model, form, size = case
        row: dict[str, Any] = {"kind": kind, "model": model, "form": form, "size": size}
        start = time.perf_counter()
        try:
            data = KINDS[kind][0](model, form, size).build()
            row["build_s"] = time.perf_counter() - start
            if not build_only:
                case_data = KINDS[kind][1](model, form, size)
                with turn:
                    run_case(row, data, *case_data)
        except Exception as error:
            row["failed"] = first_line(error)
        rows.put(row)


def run_case(row: dict[str, Any], data: bytes, inputs: dict[str, torch.Tensor], wanted: torch.Tensor) -> None:
    """Check a built case against ``wanted`` and time it over ``inputs``, in place, alone on the GPU."""
    stack = load_stack()
    engine = stack.trt.Runtime(stack.torch_tensorrt.logging.TRT_LOGGER).deserialize_cuda_engine(data)
    context, stream = engine.create_execution_context(), torch.cuda.Stream()
    held = {name: tensor.cuda() for name, tensor in inputs.items()}
    held["out"] = torch.full(wanted.shape, float("nan"), dtype=torch.float16, device="cuda")
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for name in names:  # k0_out is the cache k0, updated where it lies; k0_new the new token's keys
        if name.endswith("_new"):
            held[name] = torch.empty(tuple(engine.get_tensor_shape(name)), dtype=torch.float16, device="cuda")
        context.set_tensor_address(name, held[name.removesuffix("_out")].data_ptr())
    torch.cuda.synchronize()
    launch = partial(context.execute_async_v3, stream.cuda_stream)
    launch()
    stream.synchronize()
    got = held["out"].float().cpu()
    row["relative_error"] = float((got - wanted).norm() / wanted.norm())
    graph = captured(stream, launch)
    times = []
    with torch.cuda.stream(stream):
        for _ in range(30):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(5):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / 5)
    row["kernels"] = kernel_times(launch)
    row["us"] = float(np.median(times[5:]))
    row["bytes"] = sum(held[name].nbytes for name in inputs)
    if row["kind"] == "linear":
        row["bytes"] = sum(w.nbytes for layer in linear_weights(row["model"], row["size"]) for w in layer)
    row["gb_per_s"] = row["bytes"] / row["us"] / 1e3


def kernel_times(launch: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Name, launches and microseconds of each kernel of one ``launch``, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        launch()
        torch.cuda.synchronize()
    rows = [(event.key[:90], event.count, event.self_device_time_total) for event in profiler.key_averages()]
    return sorted(rows, key=lambda row: -row[2])[:30]


WRONG = 1e-2
"""Relative error above which a case is marked wrong: what is right lies below 4e-3, what is wrong above 0.3."""


def tables(path: Path) -> str:
    """Microseconds a layer of attention, and GB/s of the linear layers, as Markdown; ✗ where the result is wrong."""
    every = rows_of(path)
    rows, where = [row for row in every if "us" in row], caption(on := environment_of(every)) + f".{aged(on)}"
    text = []
    for model in dict.fromkeys(row["model"] for row in rows if row["kind"] == "attention"):
        found = {(r["form"], r["size"]): r for r in rows if r["model"] == model and r["kind"] == "attention"}
        sizes = sorted({size for _, size in found})
        forms = dict.fromkeys(form for form, _ in found)
        cells = [
            [
                f"{c['us'] / CHAIN:.1f}{' ✗' if c['relative_error'] > WRONG else ''}" if c else "–"
                for c in (found.get((form, size)) for size in sizes)
            ]
            for form in forms
        ]
        heads = "{}/{} heads of {}".format(*HEADS[model])
        head = ["form", *(f"{size} keys" for size in sizes)]
        text.append(_table(f"**{model}**, {heads}, us a layer; {where}", head, zip(forms, cells, strict=True)))
    linear = [row for row in rows if row["kind"] == "linear"]
    if linear:
        cases = dict.fromkeys((row["model"], row["size"]) for row in linear)
        speeds = {(row["form"], row["model"], row["size"]): row["gb_per_s"] for row in linear}
        lines = [
            (form, [f"{speeds[form, *c]:.0f}" if (form, *c) in speeds else "–" for c in cases])
            for form in dict.fromkeys(row["form"] for row in linear)
        ]
        head = ["form", *(f"{model} {part}, GB/s" for model, part in cases)]
        text.append(_table(f"**Products of one row with the weights**; {where}", head, lines))
    steps = {(row["form"], row["model"]): row for row in rows if row["kind"] == "step"}
    if steps:
        models = list(dict.fromkeys(model for _, model in steps))
        measured = dict.fromkeys(form for form, _ in steps)
        made = sorted(measured, key=lambda form: list(STEP).index(form) if form in STEP else len(STEP))
        lines = [
            (
                f"`{form}`",
                [
                    f"{c['us'] / STEP_LAYERS[c['model']]:.1f}" if c else "–"
                    for c in (steps.get((form, model)) for model in models)
                ],
            )
            for form in made
        ]
        head = ["form", *(f"{model}, us a layer" for model in models)]
        text.append(_table(f"**Decoder layers**, one token over {STEP_KEYS} keys; {where}", head, lines))
    return "\n".join(text)


def _table(title: str, head: list[str], lines: Iterable[tuple[str, list[str]]]) -> str:
    rows = [head, ["---"] * len(head), *([form, *cells] for form, cells in lines)]
    return f"{title}\n\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, check and time every form of a decode step's layers.")
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--models", default=",".join(HEADS))
    parser.add_argument("--out", type=Path, default=Path("outputs/kernels"))
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--build-only", action="store_true", help="on a machine without a GPU")
    parser.add_argument("--forms", help="only these, with commas between them")
    parser.add_argument("--parts", help="of the linear forms only these: layers, head")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--table", type=Path, help="print the Markdown tables of this kernels.jsonl, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(arguments.table))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    every = cases(arguments.kinds, arguments.models.split(","))
    forms, parts = (text.split(",") if text else None for text in (arguments.forms, arguments.parts))
    chosen = [c for c in every if (not forms or c[2] in forms) and (not parts or c[0] != "linear" or c[3] in parts)]
    chosen = chosen[: arguments.limit]
    context = multiprocessing.get_context("spawn")
    tasks, rows, turn = context.Queue(), context.Queue(), context.Lock()
    for case in chosen:
        tasks.put(case)
    workers = [
        context.Process(target=work, args=(tasks, rows, turn, arguments.build_only), daemon=True)
        for _ in range(min(arguments.jobs, len(chosen)))
    ]
    for worker in workers:
        worker.start()
    with (arguments.out / "kernels.jsonl").open("a") as file:
        if not arguments.build_only:
            file.write(json.dumps({"environment": asdict(environment(load_stack().versions()))}) + "\n")
        for _ in chosen:
            row = rows.get()
            file.write(json.dumps(row) + "\n")
            file.flush()
            print({k: v for k, v in row.items() if k != "kernels"}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
