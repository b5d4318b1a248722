"""The engine of a run back out of MLflow, if it was verified and nobody has changed it since."""

from __future__ import annotations

import json
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from passes.errors import UserError
from pipeline.host.files import sha256_of
from pipeline.record.report import ENGINE, GRAPH, NOT_VERIFIED, read_report, verified_by
from pipeline.tracking.store import as_user_error, check_store, open_client, quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ENGINE_FILE = "engine.trt"
MANIFEST_FILE = "engine.json"


def fetch_engine(
    run_id: str, uri: str = "sqlite:///mlflow.db", folder: Path | None = None, graph_suffices: bool = False
) -> Path:
    """The verified engine file of a run, its manifest ``engine.json`` beside it, both with the hash recorded for the
    run.

    Files are copied into ``folder``; without one, a local store's are returned in place and a server's
    land in a new temporary folder.  ``graph_suffices``: take an engine that was never executed, whose graph alone was
    verified, too.  Raises :class:`UserError` when run or engine is missing, when it was not verified, or when file,
    manifest and run do not agree on the SHA-256.
    """
    source = f"run_id={run_id}"
    store = check_store(uri, must_exist=True)
    with as_user_error(source), quiet():
        client = open_client(store)
        run = client.get_run(run_id)
        names = {item.path for item in client.list_artifacts(run_id)}
        if missing := [name for name in (ENGINE_FILE, MANIFEST_FILE) if name not in names]:
            remedy = "take a run that built an engine, with tracking.log_engine=true"
            raise UserError(f"{source}: holds no {' and no '.join(missing)}; {remedy}")
        verified = _verified_by(client, run)
        if verified == GRAPH and not graph_suffices:
            raise UserError(
                f"{source}: its engine was never executed, no GPU could: only its graph was verified, in PyTorch; "
                "repeat the run on a GPU, or take the engine as it is with graph_suffices=True"
            )
        if verified not in (ENGINE, GRAPH):
            raise UserError(f"{source}: its engine did not pass verification; take a run with verify.passed = 1")
        if folder is None and run.info.artifact_uri.startswith("file:"):
            engine = Path(url2pathname(urlsplit(run.info.artifact_uri).path)) / ENGINE_FILE
        else:
            copies = folder or Path(tempfile.mkdtemp(prefix="engine-"))
            copies.mkdir(parents=True, exist_ok=True)
            engine = copies / ENGINE_FILE
            with redirect_stderr(StringIO()):  # a progress bar that counts files: 0 of 1, 1 of 1
                for name in (MANIFEST_FILE, ENGINE_FILE):
                    client.download_artifacts(run_id, name, str(copies))
    try:
        _check_hash(source, engine, engine.with_name(MANIFEST_FILE), run.data.tags.get("engine.sha256"))
    except UserError:
        if folder is not None:
            engine.unlink()  # the copy: nobody shall pick it up
        raise
    return engine


def _verified_by(client: MlflowClient, run: Run) -> str:
    """What of the run was verified.  Runs of before said only whether something was, and their report says what."""
    tag = run.data.tags.get("engine.verified", NOT_VERIFIED)
    if tag != "true":
        return tag
    with tempfile.TemporaryDirectory() as copies, redirect_stderr(StringIO()):
        report = read_report(Path(client.download_artifacts(run.info.run_id, "report.json", copies)))
    return NOT_VERIFIED if report is None else verified_by(report)


def _check_hash(source: str, engine: Path, manifest: Path, recorded: str | None) -> None:
    try:
        claimed = json.loads(manifest.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{source}: {MANIFEST_FILE} is no engine manifest with a sha256; build the engine again"
        ) from None
    actual = sha256_of(engine)
    for holder, expected in (("manifest", claimed), ("run", recorded)):
        if expected != actual:
            raise UserError(
                f"{source}: {ENGINE_FILE} has sha256 {actual}, but its {holder} says {expected}; it was changed "
                "after the run, build it again"
            )
