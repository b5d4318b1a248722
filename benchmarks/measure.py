"""Measures what docs/results.md is made of: ``python -m benchmarks.measure benchmarks/results/NAME [PART ...]``.

Needs a GPU, and nothing else that runs on it or keeps the host busy: eager PyTorch is bound by the host.  Each part is
one sweep or a few (:data:`PARTS`), whose reports are kept in the folder under names of their own, as they are; engines
are thrown away.  What ends it, the same command goes on with it: jobs that are finished are not done again.
``python -m benchmarks.measure --dry-run`` prints the sweeps.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

GEMMA = ["model=gemma3_270m", "quantize.base=bf16", "quantize.prompt=bf16"]
"""Its numbers are beyond the range of fp16."""
IN_BLOCKS_OF_32 = [
    "precision=int4_weights", "quantize.block=32", "quantize.method=round,gptq", "sweep.baseline=quantize.method:round",
]  # fmt: skip
PARTS: dict[str, list[list[str]]] = {
    "generations": [["experiment=issue_4129"]],
    "prompts": [["experiment=prefill"], ["experiment=prefill", "row=prefill/dynamic", "shape.exact=[]"]],
    "lengths": [["experiment=prompt_lengths"]],
    "batches": [["experiment=batches"]],
    "windows": [["experiment=windows", "model=gemma3_270m"]],
    "windows_mistral": [["experiment=windows", "model=mistral_7b"]],
    "long": [["experiment=long_prompts"]],
    "long_gemma": [["experiment=long_prompts", "model=gemma3_270m", "cache.chunk=2048"]],
    "precisions": [["experiment=precision"]],
    "precisions_gemma": [
        [
            "experiment=precision",
            *GEMMA,
            "precision=bf16,int8_weights,int4_weights,fp8",
            "sweep.baseline=precision:bf16",
        ],
    ],
    "precisions_random": [
        ["experiment=precision", "model=llama3_1b,qwen3_0_6b", "model.weights=random", "verify.quality=false"],
    ],
    "blocks": [["experiment=precision", *IN_BLOCKS_OF_32]],
    "blocks_gemma": [["experiment=precision", *GEMMA, *IN_BLOCKS_OF_32]],
    "hybrids": [["experiment=hybrids"]],
    "passes": [["experiment=without_passes"]],
    "passes_of_prompts": [
        ["experiment=prefill", "row=prefill/dynamic", "strategy.without=[],[read_heads_twice],[multiply_gates]"],
    ],
    "smollm2": [["model=smollm2_135m", "precision=fp16,bf16"]],
}
"""The settings of each sweep.  Real weights (``smollm2``, those of ``precisions`` and ``blocks``) are fetched, or found
where they were fetched before."""
WORK = Path("outputs/measure")
ENGINES = ("*.trt",)


def sweeps(parts: Iterable[str], more: Iterable[str]) -> list[list[str]]:
    """The command line of each sweep of ``parts``, with the settings ``more`` for all of them."""
    made = []
    for part in parts:
        for number, settings in enumerate(PARTS[part]):
            to = f"output={WORK / part / str(number)}"
            kept = ["tracking.log_engine=false", f"tracking.uri=sqlite:///{WORK}/mlflow.db", "store.enabled=false"]
            made.append(["-m", *settings, to, *kept, *more])
    return made


def name_of(report: Mapping[str, Any]) -> str:
    """What a report's file is called: ``llama3_1b-detect_causal-fp16-generate-in_engine``, and how it differs."""
    config = report["config"]
    backend, shape, strategy = config["backend"], config["shape"], config["strategy"]
    ours = backend["name"] == "tensorrt"
    parts = [config["model"]["name"], strategy["name"] if ours else backend["name"], config["precision"]]
    if (generate := config["benchmark"].get("generate")) is not None:
        parts += ["generate", config["cache"]["name"]]
        parts += [f"batch{generate['batch']}"] if generate["batch"] > 1 else []
    else:
        parts += [shape["kind"]] + ([str(shape["max"])] if shape["max"] != 2048 else [])
        parts += (
            ["range"] if shape["kind"] == "dynamic" and not shape["exact"] and strategy["name"] != "upstream" else []
        )
    quantize = config.get("quantize") or {}
    parts += [f"block{quantize['block']}"] if quantize.get("block") else []
    parts += [quantize["method"]] if quantize.get("method") else []
    parts += [backend["attention"]] if backend.get("attention") else []
    parts += [f"chunk{config['cache']['chunk']}"] if config["cache"].get("chunk") else []
    parts += [f"without_{name}" for name in strategy.get("without") or []]
    return "-".join(parts)


def keep(work: Path, to: Path) -> list[str]:
    """Copy the report of every job that is over from below ``work`` into ``to``, and delete its engines; returns the
    names of those that are there now."""
    kept: list[str] = []
    seen: Counter[str] = Counter()
    for path in sorted(work.rglob("report.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["status"] in ("ok", "unavailable"):
            to.mkdir(parents=True, exist_ok=True)
            name = name_of(report)
            seen[name] += 1  # another process that did the same, or one of another sweep, keeps its own
            kept.append(f"{name}-{seen[name]}" if seen[name] > 1 else name)
            shutil.copyfile(path, to / f"{kept[-1]}.json")
            for engine in (found for pattern in ENGINES for found in path.parent.glob(pattern)):
                engine.unlink()
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what docs/results.md is made of.")
    parser.add_argument("to", type=Path, nargs="?", help="folder of the reports, one for each card and stack")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them where none is named")
    parser.add_argument("--set", action="append", default=[], help="a setting for every sweep: sweep.builders=8")
    parser.add_argument("--dry-run", action="store_true", help="print the sweeps")
    asked = parser.parse_args()
    if str(asked.to) in PARTS:  # no folder was named
        asked.to, asked.parts = None, [str(asked.to), *asked.parts]
    if unknown := [part for part in asked.parts if part not in PARTS]:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    commands = [[sys.executable, "-m", "pipeline", *each] for each in sweeps(asked.parts or PARTS, asked.set)]
    if asked.dry_run:
        print("\n".join(shlex.join(["python", *command[1:]]) for command in commands))
        return 0
    if asked.to is None:
        parser.error("say where the reports go")
    worst = 0
    WORK.mkdir(parents=True, exist_ok=True)
    for command in commands:
        child = subprocess.Popen(command)
        while True:
            try:
                worst = max(worst, child.wait(timeout=10))
                break
            except subprocess.TimeoutExpired:
                keep(WORK, asked.to)  # as they come: whatever ends this, they are there, and the disk is not full
    print(f"{len(keep(WORK, asked.to))} reports in {asked.to}")
    return worst


if __name__ == "__main__":
    sys.exit(main())
