"""What a model costs that is taken home: opening it, and an answer over HTTP.

``python -m benchmarks.answers OUTPUT_FOLDER --to FILE``, for a run that left a model (``tracking.log_model``), on the
GPU that it was built for; ``--on-cpu torch`` elsewhere, where the times are those of PyTorch.  One JSON line: seconds
to open it by ``mlflow.pyfunc.load_model`` beside those of its engines' bytes alone, read and deserialised; milliseconds
of an answer from a real ``mlflow models serve`` process beside those of the same tokens written in this process.
Medians; what is compared takes turns.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from passes.tensorrt.versions import load_stack
from pipeline.deploy import described as descriptions
from pipeline.deploy.log import DATA
from pipeline.deploy.writers import Writer
from pipeline.generate.greedy import chat_form
from pipeline.generate.sampling import Sampling
from pipeline.record.environment import environment
from pipeline.tracking.runs import MODEL

QUESTION = "Count from one to five hundred, in words."
OPENED = 5
STARTS_WITHIN_S = 300.0


def data_of(folder: Path) -> Path:
    """What :mod:`pipeline.deploy.log` wrote of the model in a run's ``folder``, where MLflow keeps it."""
    return folder / MODEL / "data" / DATA


def seconds_of(work: Callable[[], object]) -> float:
    gc.collect()
    began = time.perf_counter()
    kept = work()
    found = time.perf_counter() - began
    del kept
    return found


def opening(folder: Path) -> dict[str, float]:
    """Medians of both ways in seconds; the files are in the page cache."""
    import mlflow

    from pipeline.engine.session import Session

    model, stack = folder / MODEL, load_stack()
    engines = [folder / engine.file for engine in descriptions.read(data_of(folder)).engines]

    def alone() -> object:
        return [Session(stack, engine.read_bytes()) for engine in engines]

    def whole() -> object:
        return mlflow.pyfunc.load_model(str(model))

    alone(), whole()  # imports
    times = [(seconds_of(whole), seconds_of(alone)) for _ in range(OPENED)]
    return {"load_model_s": median(each for each, _ in times), "engines_alone_s": median(each for _, each in times)}


@contextlib.contextmanager
def served(model: Path, on_cpu: str | None) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """What asks a server of ``model`` that is at work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = os.environ | {"SERVING_MODEL_CONFIG": json.dumps({"on_cpu": on_cpu}), "PATH": path}
    process = subprocess.Popen([*command, "-p", str(port)], env=variables, start_new_session=True, stdout=sys.stderr)

    def ask(asked: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = Request(f"http://127.0.0.1:{port}/invocations", json.dumps(asked).encode(), headers)
        with urlopen(request, timeout=600) as reply:
            answer: dict[str, Any] = json.loads(reply.read())
        return answer

    try:
        until = time.monotonic() + STARTS_WITHIN_S
        while process.poll() is None and time.monotonic() < until:
            try:
                urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except URLError:
                time.sleep(0.5)
        else:
            raise SystemExit(f"{model}: its server did not answer (exit code {process.poll()})")
        yield ask
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def writer_of(folder: Path, on_cpu: str | None) -> Writer:
    found = descriptions.read(data_of(folder))
    if on_cpu is None:
        from pipeline.deploy import of_engine

        return of_engine.writer(found, folder)
    from pipeline.deploy import of_graph

    return of_graph.writer(found, partial(print, file=sys.stderr))


def answering(folder: Path, tokens: int, requests: int, on_cpu: str | None) -> dict[str, float]:
    """Medians of both ways in milliseconds, of the same prompt and as many tokens as the server answers with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_of(folder) / descriptions.TOKENIZER, local_files_only=True)
    messages = [{"role": "user", "content": QUESTION}]
    prompt, writer = chat_form(tokenizer, tuple(messages)), writer_of(folder, on_cpu)
    asked: dict[str, Any] = {"messages": messages, "max_tokens": tokens, "temperature": 0}
    with served(folder / MODEL, on_cpu) as ask:
        reply = ask(asked)
        stopped = reply["choices"][0]["finish_reason"] == "stop"
        written = int(reply["usage"]["completion_tokens"]) + stopped  # the token that ends it is one more step
        sum(1 for _ in writer.steps(prompt, written, Sampling()))
        times = []
        for _ in range(requests):
            there = seconds_of(lambda: ask(asked))
            times.append((there, seconds_of(lambda: list(writer.steps(prompt, written, Sampling())))))
    return {
        "prompt_tokens": len(prompt),
        "tokens": written,
        "served_ms": median(each for each, _ in times) * 1e3,
        "in_process_ms": median(each for _, each in times) * 1e3,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What a model costs that is taken home.")
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--to", type=Path, required=True, help="file to which the line is added")
    parser.add_argument("--on-cpu", choices=["torch"], help="the run's graph in PyTorch: times of another machine")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=11)
    asked = parser.parse_args()
    if not (data_of(asked.folder) / descriptions.FILE).is_file():
        parser.error(f"{asked.folder}: left no model; runs with a tokenizer leave one, see tracking.log_model")
    found: dict[str, Any] = {"run": json.loads((asked.folder / "report.json").read_text(encoding="utf-8"))["config"]}
    found |= {"on_cpu": asked.on_cpu, "environment": asdict(environment(load_stack().versions()))}
    if asked.on_cpu is None:
        found |= opening(asked.folder)
    found |= answering(asked.folder, asked.tokens, asked.requests, asked.on_cpu)
    with asked.to.open("a", encoding="utf-8") as kept:
        kept.write(json.dumps(found) + "\n")
    print(json.dumps({key: value for key, value in found.items() if isinstance(value, (int, float))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
