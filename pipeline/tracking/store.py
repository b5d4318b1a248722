"""Opening an MLflow store: is it there, does it take a run, and which experiment; in seconds, with one-line errors."""

from __future__ import annotations

import logging
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from passes.errors import UserError, message_line
from pipeline.host.files import locked
from pipeline.private import of_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # those that MLflow has schemas for
SERVER_TIMEOUT_S = 5
LOCK_TIMEOUT_S = 60  # a sibling run may be creating the tables, about 3 s


def check_store(uri: str, must_exist: bool = False) -> str:
    """Ask the store at ``uri`` whether it takes a run, creating nothing; returns the URI free of the working folder.

    Raises :class:`UserError`.  A server has ``SERVER_TIMEOUT_S`` seconds to answer, where MLflow's client would
    retry for minutes.
    """
    key = f"tracking.uri={redacted(uri)}"
    dialect = uri.partition(":")[0].partition("+")[0]
    if "://" in uri and is_server(uri):
        _check_server(key, uri)
        return uri
    if "://" not in uri or dialect not in DATABASES:
        raise UserError(f"{key}: not a store; name a database or a server, sqlite:///mlflow.db or http://HOST:PORT")

    import sqlalchemy

    try:
        url = sqlalchemy.make_url(uri)
        if dialect == "sqlite":
            if url.host or not url.database or url.database == ":memory:":
                raise UserError(f"{key}: names no file; write sqlite:///mlflow.db, with three slashes")
            path = Path(url.database).absolute()
            _check_sqlite(key, path, must_exist)
            return f"sqlite:///{path}"
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        with engine.connect():
            return uri
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise UserError(f"{key}: cannot be opened ({message_line(error)}); check the address and its driver") from None


def redacted(uri: str) -> str:
    """``uri`` with the password of ``user:password@host`` masked: parameters and messages are read by others."""
    return re.sub(r"(://[^/:@\s]*):[^/@\s]+@", r"\1:***@", uri)


def _check_server(key: str, uri: str) -> None:
    from mlflow.exceptions import MlflowException

    endpoint, remedy = "/api/2.0/mlflow/experiments/search", "start it with `mlflow server`, or use tracking=local"
    try:
        answer = of_mlflow.post(uri, endpoint, SERVER_TIMEOUT_S, {"max_results": 1})
    except MlflowException:
        raise UserError(f"{key}: no MLflow server answers there within {SERVER_TIMEOUT_S} s; {remedy}") from None
    if answer.status_code in (401, 403):
        raise UserError(f"{key}: refuses access (status {answer.status_code}); set MLFLOW_TRACKING_TOKEN")
    if answer.status_code != 200 or not answer.headers.get("content-type", "").startswith("application/json"):
        raise UserError(f"{key}: does not answer as an MLflow server does (status {answer.status_code}); {remedy}")


def _check_sqlite(key: str, path: Path, must_exist: bool) -> None:
    if not path.exists():
        if must_exist:
            raise UserError(f"{key}: there is no {path}; name the store in which the run was recorded")
        if not path.parent.is_dir():
            raise UserError(f"{key}: there is no folder {path.parent}; create it, or name a file in another one")
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                return
        except OSError as error:
            raise UserError(f"{key}: cannot write to {path.parent} ({error.strerror}); name another file") from None
    try:
        address = f"{path.as_uri()}?mode=rw"  # never creates
        with closing(sqlite3.connect(address, timeout=LOCK_TIMEOUT_S, uri=True)) as database:
            # Takes the write lock; of a file that is read-only SQLite makes it a read lock, without a word.
            database.execute("BEGIN IMMEDIATE")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            database.execute(f"PRAGMA user_version = {version}")  # writes, if only to the journal
            database.rollback()
    except sqlite3.Error as error:
        raise UserError(f"{key}: cannot be used ({error}); repair it, or name another file") from None


def open_client(uri: str) -> MlflowClient:
    """A client of the store; the first one in a database creates the tables, one process at a time."""
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri)
    with locked(Path(uri.removeprefix("sqlite:///") + ".lock"), LOCK_TIMEOUT_S):
        return MlflowClient(tracking_uri=uri)


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment ``name``, created on first use; artifacts of an SQLite store lie beside its file."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith("sqlite:///"):
            folder = re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"
            location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / folder).as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise UserError(f"tracking.experiment={name}: {message_line(error)}") from None
            found = client.get_experiment_by_name(name)  # a sibling run was first
            assert found is not None
    if found.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment={name}: was deleted from this store; take another name, or "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    if found.artifact_location.startswith("mlflow-artifacts:") and not is_server(uri):
        raise UserError(
            f"tracking.experiment={name}: keeps its artifacts on a server; set tracking.uri=http://HOST:PORT "
            "of that server, or take another name"
        )
    return str(found.experiment_id)


def is_server(uri: str) -> bool:
    """Whether the store is a tracking server, not a database opened directly."""
    return uri.startswith(("http://", "https://"))


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow's client, its artifact folders and :func:`check_store` raise."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError  # what fails while MLflow creates its tables comes unwrapped

    return MlflowException, SQLAlchemyError, UserError, OSError


@contextmanager
def as_user_error(key: str) -> Iterator[None]:
    """Anything the store refuses, as a :class:`UserError` about ``key``."""
    try:
        yield
    except UserError:
        raise
    except store_errors() as error:
        raise UserError(f"{key}: {message_line(error)}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Log messages are held back meanwhile: MLflow and alembic narrate every migration, and what the store refuses is
    logged with its traceback beside being raised.

    ``logging.disable`` and not the level of their loggers: MLflow sets those anew on import and when it migrates.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.disable(before)


def folder_of(run: Run) -> Path | None:
    """Where the artifacts of ``run`` lie on this machine; None where a server or another store has them."""
    return folder_at(run.info.artifact_uri)


def folder_at(address: str) -> Path | None:
    """The folder that an address of artifacts means; None where it is none on this machine."""
    return Path(url2pathname(urlsplit(address).path)) if address.startswith("file:") else None


def artifact(client: MlflowClient, run: Run, name: str, copies: Path) -> Path | None:
    """The file ``name`` of the artifacts of ``run``: where it lies, or copied into the folder ``copies``; None where
    there is none."""
    if (here := folder_of(run)) is not None:
        return here / name if (here / name).exists() else None
    if name not in {item.path for item in client.list_artifacts(run.info.run_id)}:
        return None
    copies.mkdir(parents=True, exist_ok=True)
    with redirect_stderr(StringIO()):  # a progress bar that counts files: 0 of 1, 1 of 1
        return Path(client.download_artifacts(run.info.run_id, name, str(copies)))


def search_runs(client: MlflowClient, experiment: str, asked: str = "") -> list[Run]:
    """Every run of the experiment with that id that fits the filter ``asked``, however many pages the store gives."""
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment], asked, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
