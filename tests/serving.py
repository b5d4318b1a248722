"""A real ``mlflow models serve`` process, requests to it, and a small model that answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from conftest import save_tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reply = tuple[int, dict[str, Any]]


TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"


def characters(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """A byte a token, so that a character may be several; 127 ends a turn."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    whole = Tokenizer(models.BPE(alphabet, []))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=whole, chat_template=template)


def save_answering_llama(folder: Path) -> Path:
    """Make ``folder`` that of a tiny random Llama that is talked to in :func:`characters`."""
    save_tiny_llama(folder, vocab_size=256)
    characters().save_pretrained(folder)
    return folder


@contextmanager
def served(model: str, uri: str, cwd: Path, on_cpu: str | None = "torch") -> Iterator[Server]:
    """``model`` served from folder ``cwd``, from which the checkout cannot be imported: its code comes with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "MLFLOW_TRACKING_URI": uri,
        "SERVING_MODEL_CONFIG": json.dumps({"on_cpu": on_cpu}),
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "300",
        "OMP_WAIT_POLICY": "passive",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    log = cwd / "serve.log"
    with log.open("w") as shown:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local", "-p", str(port)],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=shown,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def asked(content: str, **more: Any) -> dict[str, Any]:
    """A request of one message."""
    return {"messages": [{"role": "user", "content": content}], **more}


def several_at_once(
    server: Server, right: Sequence[dict[str, Any]], wrong: Sequence[tuple[Any, str]], at_once: int
) -> None:
    """Requests with wrong ones among them, each with what is said of it: the right ones are answered as each is alone.

    They are greedy."""
    texts = {json.dumps(request): request for request in right}
    alone = {text: server.ask(request) for text, request in texts.items()}
    assert {status for status, _ in alone.values()} == {200}
    assert len({str(reply["choices"]) for _, reply in alone.values()}) > len(texts) / 2, "they differ"
    every: list[tuple[Any, str | None]] = [(request, None) for request in right]
    for i, each in enumerate(wrong):
        every.insert(i * len(every) // len(wrong), each)
    with ThreadPoolExecutor(at_once) as pool:
        replies = list(pool.map(server.ask, [request for request, _ in every]))
    for (request, said), (status, reply) in zip(every, replies, strict=True):
        if said is None:
            _, expected = alone[json.dumps(request)]
            assert (status, reply["choices"], reply["usage"]) == (200, expected["choices"], expected["usage"])
        else:
            assert status == 400 and said in reply["message"], (request, status, reply)


class Server:
    def __init__(self, process: subprocess.Popen[bytes], address: str, log: Path) -> None:
        self.process, self.address, self._log = process, address, log

    @property
    def shown(self) -> str:
        return self._log.read_text()

    def wait(self, seconds: float = 300) -> None:
        """Until it answers."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, self.shown
            try:
                if requests.get(f"{self.address}/ping", timeout=5).status_code == 200:
                    return
            except requests.ConnectionError:
                time.sleep(0.5)
        raise AssertionError(f"does not answer after {seconds} s: {self.shown}")

    def ask(self, request: Any) -> Reply:
        """Status and body of the answer; what is no text is sent as JSON, NaN included."""
        body = request if isinstance(request, str) else json.dumps(request)
        headers = {"Content-Type": "application/json"}
        answer = requests.post(f"{self.address}/invocations", data=body, headers=headers, timeout=600)
        return answer.status_code, answer.json()
