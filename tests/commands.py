"""The command in processes of its own, for tests of how runs end: in a fresh interpreter, or forked from one that has
imported everything, which spares a test fifteen seconds of processor time a run."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from sweeps import BEFORE, ROOT, wait_for

FORKS = """
import ctypes, json, os, signal, sys
import mlflow.store.tracking.sqlalchemy_store, torch, transformers.models.llama.modeling_llama
import pipeline.tracking.recovery, pipeline.sweep.preload
# Imports a hundred modules more.
torch.export.export(torch.nn.Linear(2, 2), (torch.ones(3, 2),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))

def without_the_privileges_of_root():
    # capset(2): from here on permissions of files bind root as they bind everybody
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0

print("ready", flush=True)
for order in map(json.loads, sys.stdin):
    pid = os.fork()
    if pid == 0:
        os.chdir(order["cwd"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        out = os.open(order["fifo"], os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        without_the_privileges_of_root()
        sys.argv[1:] = order["arguments"]
        from pipeline.start import main
        main()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Command:
    """One start of the command; ``code`` and ``shown`` once it has been waited for."""

    def __init__(self, pid: int, ended: Callable[[], tuple[int, str]]) -> None:
        self.pid, self._ended = pid, ended
        self.code, self.shown = 0, ""

    def finish(self) -> Command:
        self.code, self.shown = self._ended()
        return self

    def running(self) -> bool:
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def processor_s(self) -> float:
        """What it has taken so far; unlike time it does not depend on what else runs on the machine."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def limit_files(self, size: int) -> None:
        """From now on no file of its grows above ``size`` bytes: ``EFBIG``, where a full disk has ``ENOSPC``."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, size))

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Until ``condition`` holds; fails where the command ends before."""
        wait_for(lambda: condition() or not self.running())
        assert condition(), self.finish().shown

    def interrupt_after(self, seconds: float) -> None:
        """Ctrl-C once it has taken ``seconds`` of processor time since it handles signals."""
        try:
            wait_for(lambda: _handles_signals(self.pid) or not self.running())
            start = self.processor_s()
            wait_for(lambda: self.processor_s() - start >= seconds or not self.running(), pause=0.005)
            self.send(signal.SIGINT)
        except (psutil.Error, ProcessLookupError):
            pass  # it has ended


def _handles_signals(pid: int) -> bool:
    """Whether ``pipeline.start`` has installed its handlers; before, the interpreter itself is starting."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def environment() -> dict[str, str]:
    """This process's own, in which the checkout and whatever was on the path before can be imported."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), BEFORE]))}


def start(cwd: Path, *arguments: str) -> Command:
    """``python -m pipeline``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def ended() -> tuple[int, str]:
        shown, _ = process.communicate(timeout=600)
        return process.returncode, shown

    return Command(process.pid, ended)


class Warm:
    """Has everything imported, and forks the command; one at a time.  What it forks has no privileges of root."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._line() == "ready"

    def start(self, cwd: Path, *arguments: str) -> Command:
        fifo = cwd / ".shown"
        os.mkfifo(fifo)
        print(json.dumps({"cwd": str(cwd), "fifo": str(fifo), "arguments": arguments}), file=self._process.stdin)
        assert self._process.stdin is not None
        self._process.stdin.flush()
        shown: list[str] = []
        with_it = fifo.open()  # as soon as the command has it open too
        fifo.unlink()
        reader = threading.Thread(target=lambda: shown.append(with_it.read()))
        reader.start()
        pid = int(self._line())

        def ended() -> tuple[int, str]:
            code = int(self._line())
            reader.join()
            with_it.close()
            return code, shown[0]

        return Command(pid, ended)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
