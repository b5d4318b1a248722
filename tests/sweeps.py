"""Sweeps in processes of their own, for tests: the real command, jobs that misbehave on purpose, and what is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
BEFORE = os.environ.get("PYTHONPATH", "")
"""A GPU host may have the libraries there."""


@dataclass(frozen=True)
class Sweep:
    """The same command, as often as it takes."""

    cwd: Path
    arguments: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests" / "misbehaviour"), str(ROOT), BEFORE])),
            "BEHAVE": str(self.cwd / "behave"),
        }

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "-m", *self.arguments],
            cwd=self.cwd,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell's background jobs ignore Ctrl-C, and their children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self) -> tuple[int, str]:
        """Exit code and everything that was printed."""
        process = self.start()
        shown, _ = process.communicate(timeout=600)
        return process.returncode, shown

    def behave(self) -> None:
        """From now on no job misbehaves."""
        (self.cwd / "behave").touch()

    def entries(self) -> dict[str, dict[str, Any]]:
        """Label of a job -> its entry in the newest summary."""
        newest = max(self.cwd.glob("outputs/sweeps/*/summary.json"), key=lambda path: path.stat().st_mtime)
        return {entry["job"]: entry for entry in json.loads(newest.read_text())["jobs"]}

    def table(self) -> dict[str, tuple[Any, ...]]:
        """What may not depend on when the sweep was killed."""
        return {label: (entry["status"], entry.get("failure")) for label, entry in self.entries().items()}

    def processes(self) -> list[psutil.Process]:
        """Everything that runs in the sweep's folder."""
        return list(_in(self.cwd))

    def children(self) -> list[psutil.Process]:
        """The processes of jobs: the leaders of the sessions that the sweep opened."""
        return [p for p in self.processes() if _leads(p) and p.ppid() != os.getpid()]


def make(cwd: Path, model: Path, *arguments: str) -> Sweep:
    """A sweep whose jobs only load the model, unless ``arguments`` say more."""
    cwd.mkdir(parents=True, exist_ok=True)
    settings = ("model=local", f"model.path={model}", "shape.max=16", "benchmark=none")
    stop = () if any(each.startswith("until=") for each in arguments) else ("until=load",)
    return Sweep(cwd, (*settings, *stop, *arguments))


def _in(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def _leads(process: psutil.Process) -> bool:
    try:
        return os.getsid(process.pid) == process.pid
    except ProcessLookupError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A tracking server that can be killed and started again; it keeps its artifacts in ``folder``, and its runs in
    ``store``, which is an SQLite file there where none is named."""

    def __init__(self, folder: Path, store: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.process = folder, None
        self.store = store or f"sqlite:///{folder}/server.db"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "kept")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # its job workers start slowly
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environment, start_new_session=True
            )
        wait_for(self._answers)

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its workers are processes of its group
            self.process.wait(30)


def wait_for(condition: Any, seconds: float = 120, pause: float = 0.05) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(pause)


def runs(uri: str) -> tuple[list[Any], list[Any]]:
    """The parents and the children in an MLflow store."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    return [run for run in found if "sweep.key" in run.data.tags], children
