"""A logged model, opened: its engine found by the run that it belongs to, or its graph made again."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from passes.errors import UserError
from pipeline.deploy import described as descriptions
from pipeline.deploy.answering import Answerer
from pipeline.deploy.described import Described
from pipeline.tracking.fetch import brought
from pipeline.tracking.runs import RUN_OF_MODEL
from pipeline.tracking.store import as_user_error, check_store, open_client, quiet

ON_CPU = ("torch",)


@dataclass(frozen=True)
class Opened:
    answerer: Answerer
    name: str


def open_model(data: Path, on_cpu: str | None, uri: str, progress: Callable[[str], None]) -> Opened:
    """The model whose description is in ``data``.  ``on_cpu``: None for its engine, or ``torch`` for its graph.
    ``uri``: the MLflow store that has its run, where the engine does not lie beside it."""
    if on_cpu is not None and on_cpu not in ON_CPU:
        raise UserError(f"on_cpu={on_cpu}: allowed are {', '.join(ON_CPU)}, or nothing, which takes the engine")
    found = descriptions.read(data)
    here = version("mlflow")
    if here.partition(".")[0] != found.mlflow.partition(".")[0]:
        raise UserError(
            f"the model was logged by MLflow {found.mlflow}, and this is {here}; install mlflow=={found.mlflow}"
        )
    if on_cpu is None:
        from pipeline.deploy import of_engine

        of_engine.check_machine(found)
    with ThreadPoolExecutor(1) as beside:  # a fifth of a second, while engines are read
        tokenizer = beside.submit(_tokenizer(data))
        if on_cpu is None:
            with _engines(found, data, uri) as folder:
                writer = of_engine.writer(found, folder)
        else:
            from pipeline.deploy import of_graph

            writer = of_graph.writer(found, progress)
    return Opened(Answerer(tokenizer.result(), writer, found.settings), found.model.name)


def _tokenizer(data: Path) -> Callable[[], Any]:
    """What loads it; what that imports is imported here, by one thread."""
    from transformers import AutoTokenizer

    place = data / descriptions.TOKENIZER
    return partial(AutoTokenizer.from_pretrained, place, trust_remote_code=False, local_files_only=True)


@contextmanager
def _engines(found: Described, data: Path, uri: str) -> Iterator[Path]:
    """A folder with the engines: that of the run, where the model lies in it, else what its artifacts hold, which is
    removed once it is loaded."""
    beside = data.parent.parent.parent
    if all((beside / engine.file).is_file() for engine in found.engines):
        yield beside
        return
    try:
        run_id = str(json.loads((data / RUN_OF_MODEL).read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError):
        raise UserError(f"{data}: its engine does not lie beside it, and it names no run that has one") from None
    copies = Path(tempfile.mkdtemp(prefix="engine-"))
    try:
        with as_user_error(f"run_id={run_id}"), quiet():
            client = open_client(check_store(uri, must_exist=True))
            folder = brought(client, client.get_run(run_id), [engine.file for engine in found.engines], copies)
        yield folder
    finally:
        shutil.rmtree(copies, ignore_errors=True)
