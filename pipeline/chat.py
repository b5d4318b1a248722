"""``python -m pipeline.chat RUN``: a conversation with what a run made, at the terminal.

What the model says goes to standard output, all else to standard error.  Ctrl-C ends an answer, Ctrl-D the
conversation.  Exit code 2: something asked for cannot be done; one line says what.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from passes.errors import RunError, UserError
from pipeline.host.arguments import Parser

if TYPE_CHECKING:
    from pipeline.deploy.answering import Answer
    from pipeline.deploy.opened import Opened

DATA = Path("data") / "chat"
RUN_ID = re.compile("[0-9a-f]{32}")
VERSION = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")


def _parser() -> Parser:
    parser = Parser("python -m pipeline.chat", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run id of MLflow, a run's folder below outputs, models:/NAME@ALIAS or models:/NAME/1",
    )
    default = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    parser.add_argument("--uri", default=default, help="the MLflow store (MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)")
    parser.add_argument("--on-cpu", choices=["torch"], help="run the verified graph in PyTorch instead of the engine")
    parser.add_argument("--once", metavar="QUESTION", help="answer this alone, and end")
    parser.add_argument("--max-tokens", type=int, help="of an answer")
    parser.add_argument("--temperature", type=float, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that reach this probability")
    parser.add_argument("--seed", type=int, help="draws the same answer again")
    return parser


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as pipeline.__main__ has it
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    try:
        return _main(_parser().parse_args(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error.kind}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _main(asked: Namespace) -> int:
    from pipeline.deploy.request import Settings, read

    place = _place(asked.run)
    options = {
        key: value
        for key in ("max_tokens", "temperature", "top_p", "seed")
        if (value := getattr(asked, key)) is not None
    }
    question = "Hello" if asked.once is None else asked.once
    read({"messages": [{"role": "user", "content": question}], **options}, Settings())  # refused before it is loaded
    model = _open(place, asked.uri, asked.on_cpu)
    for note in model.answerer.notes:
        _say(note)
    if asked.once is not None:
        return 0 if _answer(model, [{"role": "user", "content": asked.once}], options) is not None else 130
    messages: list[dict[str, str]] = []
    while (question := _question()) is not None:
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = _answer(model, messages, options)
        except UserError as error:  # no room for more: what was said stays, and this question goes
            messages.pop()
            _say(f"error: {error}")
            continue
        messages.pop() if answer is None else messages.append({"role": "assistant", "content": answer.text or " "})
    return 0


def _place(run: str) -> Path | str:
    """The folder of the run's model, or ``run`` where it names one in MLflow; raises :class:`UserError` where it is
    neither."""
    folder = Path(run)
    if folder.is_dir():
        if not (folder / "model" / DATA).is_dir():
            raise UserError(f"RUN={run}: holds no model that answers; see tracking.log_model and the report's notes")
        return folder / "model"
    if RUN_ID.fullmatch(run) or VERSION.fullmatch(run):
        return run
    raise UserError(f"RUN={run}: is no folder, no run id of 32 characters and no models:/NAME@ALIAS")


def _open(place: Path | str, uri: str, on_cpu: str | None) -> Opened:
    """The model at ``place``; raises :class:`UserError` where there is none, or it cannot be opened here."""
    if isinstance(place, Path):
        from pipeline.deploy.opened import open_model

        return open_model(place / DATA, on_cpu, uri, _say)
    with tempfile.TemporaryDirectory(prefix="model-") as copies:
        return _open(_fetched(uri, place, Path(copies)), uri, on_cpu)


def _fetched(uri: str, place: str, copies: Path) -> Path:
    from pipeline.tracking.store import artifact, as_user_error, check_store, open_client, quiet

    store, version = check_store(uri, must_exist=True), VERSION.fullmatch(place)
    with as_user_error(f"RUN={place}"), quiet():
        client, run_id = open_client(store), place
        if version is not None:
            name, alias, number = version.groups()
            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
            run_id = found.run_id
        model = artifact(client, client.get_run(run_id), "model", copies)
    if model is None or not (model / DATA).is_dir():
        raise UserError(f"RUN={place}: holds no model that answers; see tracking.log_model and the report's notes")
    return model


def _question() -> str | None:
    """The next line that is typed; None at the end."""
    while True:
        try:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            _say("\n(Ctrl-D ends the conversation)")
            continue
        return line.rstrip("\n") if line else None


def _answer(model: Opened, messages: list[dict[str, str]], options: dict[str, Any]) -> Answer | None:
    """Print the answer as it comes; None where Ctrl-C ended it."""
    from pipeline.deploy.request import read

    began, answer = time.perf_counter(), None
    with _ctrl_c() as asked_to_end:
        pieces = model.answerer.stream(read({"messages": messages, **options}, model.answerer.settings))
        try:
            while not asked_to_end.is_set():
                print(next(pieces), end="", flush=True)
            pieces.close()
        except StopIteration as end:
            answer = end.value
    print(flush=True)
    if answer is None:
        _say("(ended)")
    else:
        seconds = time.perf_counter() - began
        each = f"{answer.completion_tokens / seconds:.1f} tokens/s"
        cut = ", cut off" if answer.finish_reason == "length" else ""
        _say(f"({answer.completion_tokens} tokens in {seconds:.1f} s, {each}{cut})")
    return answer


@contextmanager
def _ctrl_c() -> Iterator[Event]:
    """Meanwhile Ctrl-C only sets the event: no library is cut in two."""
    asked = Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
