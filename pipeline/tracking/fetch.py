"""The engines of a run back out of MLflow, if they were verified and nobody has changed them since."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from passes.errors import UserError
from pipeline.host.files import sha256_of, share
from pipeline.record.report import ENGINE, GRAPH, NOT_VERIFIED, read_report, verified_by
from pipeline.tracking.store import artifact, as_user_error, check_store, folder_of, open_client, quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ENGINE_FILE, DECODE_FILE = "engine.trt", "decode.trt"
MANIFEST_FILE = "engine.json"


def fetch_engine(
    run_id: str, uri: str = "sqlite:///mlflow.db", folder: Path | None = None, graph_suffices: bool = False
) -> Path:
    """The verified engine file of a run, its manifest ``engine.json`` beside it, both with the hash recorded for the
    run; where it fills a KV cache, ``decode.trt`` and its manifest too.

    Files are brought into ``folder``, on one file system under a second name (:func:`pipeline.host.files.share`);
    without one, a local store's are returned in place and a server's land in a new temporary folder.
    ``graph_suffices``: take an engine that was never executed, whose graph alone was verified, too.  Raises
    :class:`UserError` when run or engine is missing, when it was not verified, or when file, manifest and run do not
    agree on the SHA-256.
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
        with tempfile.TemporaryDirectory() as copies:
            path = artifact(client, run, "report.json", Path(copies))
            report = None if path is None else read_report(path)
        verified = _verified_by(run, report)
        if verified == GRAPH and not graph_suffices:
            raise UserError(
                f"{source}: its engine was never executed, no GPU could: only its graph was verified, in PyTorch; "
                "repeat the run on a GPU, or take the engine as it is with graph_suffices=True"
            )
        if verified not in (ENGINE, GRAPH):
            raise UserError(f"{source}: its engine did not pass verification; take a run with verify.passed = 1")
        recorded = {ENGINE_FILE: run.data.tags.get("engine.sha256")}
        if decode := (report or {}).get("decode"):
            recorded[DECODE_FILE] = decode["engine"]["sha256"]
        in_place = folder is None and folder_of(run) is not None
        if folder is None and not in_place:
            folder = Path(tempfile.mkdtemp(prefix="engine-"))
        where = brought(client, run, list(recorded), folder or Path())
        if folder is not None and where != folder:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (each for engine in recorded for each in (manifest_of(engine), engine)):
                share(where / name, folder / name)
            where = folder
    try:
        for name, sha256 in recorded.items():
            _check_hash(source, where / name, sha256)
    except UserError:
        if not in_place:
            for name in recorded:
                (where / name).unlink()  # the copies: nobody shall pick them up
        raise
    return where / ENGINE_FILE


def manifest_of(engine: str) -> str:
    """The name of the manifest beside the file ``engine``."""
    return Path(engine).with_suffix(".json").name


def brought(client: MlflowClient, run: Run, engines: list[str], copies: Path) -> Path:
    """The folder that has the files ``engines`` of ``run`` with their manifests: the run's own where it is on this
    machine, else ``copies``, into which they are copied.  Raises :class:`UserError` where the run lacks one."""
    for name in (each for engine in engines for each in (manifest_of(engine), engine)):
        if artifact(client, run, name, copies) is None:
            raise UserError(f"run_id={run.info.run_id}: holds no {name}; take a run with tracking.log_engine=true")
    return folder_of(run) or copies


def _verified_by(run: Run, report: dict[str, object] | None) -> str:
    """What of the run was verified.  Runs of before said only whether something was, and their report says what."""
    tag: str = run.data.tags.get("engine.verified", NOT_VERIFIED)
    if tag != "true":
        return tag
    return NOT_VERIFIED if report is None else verified_by(report)


def _check_hash(source: str, engine: Path, recorded: str | None) -> None:
    manifest = engine.with_name(manifest_of(engine.name))
    try:
        claimed = json.loads(manifest.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{source}: {manifest.name} is no engine manifest with a sha256; build the engine again"
        ) from None
    actual = sha256_of(engine)
    for holder, expected in (("manifest", claimed), ("run", recorded)):
        if expected != actual:
            raise UserError(
                f"{source}: {engine.name} has sha256 {actual}, but its {holder} says {expected}; it was changed "
                "after the run, build it again"
            )
