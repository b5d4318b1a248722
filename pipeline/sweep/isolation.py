"""One call in a process of its own, with a time limit: whatever it does to itself, the caller goes on.  Calls that run
at the same time can take turns at what only one may do.

The process is forked from a server that has imported the libraries and nothing else (:mod:`pipeline.sweep.preload`),
so it starts in no time and with a CUDA of its own.  Three things end it: its time limit, the caller's death, and,
should it hang in native code so that no Python runs any more, ``faulthandler``'s own thread.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

from pipeline.host import interrupts

GRACE_S = 15.0
"""How long a process that was told to end may take to write its report."""

OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/proc/vmstat")
"""Where the kernel counts the processes that it killed for memory: this control group's, and the machine's."""


@dataclass(frozen=True)
class Ended:
    """How a call ended."""

    exit_code: int
    """Negative: the number of the signal that killed the process."""
    timed_out: bool
    out_of_memory: bool
    """The kernel killed it for memory."""
    seconds: float
    interruption: BaseException | None = None
    """Ctrl-C or SIGTERM: it was handed on, and the caller has to raise it again."""

    @property
    def signal_name(self) -> str | None:
        if self.exit_code >= 0:
            return None
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:  # a real-time signal
            return f"signal {-self.exit_code}"


class Turns:
    """Among ``calls`` that run at the same time: none has its turn before every one has asked for it or ended, and
    then one has it at a time, until its process ends."""

    def __init__(self, calls: int) -> None:
        self._changed = threading.Condition()
        self._not_ready, self._taken, self.cancelled = calls, False, False
        self._waiting: set[int] = set()

    def take(self, process: int) -> frozenset[int]:
        """Wait for the turn of ``process``; returns the ids of the processes that wait for theirs meanwhile."""
        with self._changed:
            self._not_ready -= 1
            self._waiting.add(process)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.cancelled or not (self._not_ready or self._taken))
            self._taken = True
            self._waiting.discard(process)
            return frozenset(self._waiting)

    def leave(self, asked: bool) -> None:
        """A call has ended; ``asked``: it has had its turn."""
        with self._changed:
            if asked:
                self._taken = False
            else:
                self._not_ready -= 1
            self._changed.notify_all()

    def cancel(self) -> None:
        """Nobody waits any longer: the calls are being interrupted."""
        with self._changed:
            self.cancelled = True
            self._changed.notify_all()


@dataclass(frozen=True)
class Asking:
    """How a call asks for its turn, in its own process: a context that is entered once the turn has come, and gives
    the ids of the processes that wait for theirs."""

    caller: connection.Connection
    limit_s: float

    @contextmanager
    def __call__(self) -> Iterator[frozenset[int]]:
        faulthandler.cancel_dump_traceback_later()  # waiting takes as long as the others take
        self.caller.send(None)
        waiting = self.caller.recv()
        faulthandler.dump_traceback_later(self.limit_s, exit=True)
        yield waiting


def warm_up() -> None:
    """Start the server ahead of the first call; it imports while the caller does something else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.sweep.preload"])
    from multiprocessing import forkserver

    with _our_own_path():
        forkserver.ensure_running()


def call(
    target: Callable[..., int], arguments: tuple[Any, ...], log: Path, limit_s: float, turns: Turns | None = None
) -> Ended:
    """``target(*arguments)`` in a process of its own, which writes what it prints to ``log``; its result is the exit
    code.  ``target`` and ``arguments`` must be picklable.  With ``turns`` there is one argument more, :class:`Asking`;
    the time limit does not count the waiting.

    Ctrl-C and SIGTERM are handed on to the process, which then has ``GRACE_S`` to end.
    """
    killed_before, began = _killed_for_memory(), time.monotonic()
    ours = theirs = None
    if turns is not None:
        ours, theirs = _context().Pipe()
        arguments = (*arguments, Asking(theirs, limit_s + 2 * GRACE_S))
    process = _context().Process(target=_inside, args=(target, arguments, log, limit_s + 2 * GRACE_S))
    timed_out, interruption, asked, waited = False, None, False, 0.0
    try:
        process.start()
        if turns is not None and ours is not None and connection.wait([process.sentinel, ours], limit_s) == [ours]:
            ready, asked = time.monotonic(), True
            waiting = turns.take(process.pid or 0)
            waited = time.monotonic() - ready
            with suppress(OSError):  # it has been killed while it waited
                ours.send(waiting)
        process.join(max(0.0, limit_s - (time.monotonic() - began - waited)))
        if process.is_alive():
            timed_out = True
            _end(process, signal.SIGTERM)
    except (KeyboardInterrupt, SystemExit) as error:
        interruption = error
        _end(process, signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    finally:
        _kill_group(process)  # and what it had started
        if turns is not None:
            turns.leave(asked)
    exit_code = -signal.SIGKILL if process.exitcode is None else process.exitcode  # None: it never started
    if turns is not None and turns.cancelled and exit_code != 0:
        interruption = interruption or KeyboardInterrupt()
    by_someone = exit_code == -signal.SIGKILL and not timed_out and interruption is None
    out_of_memory = by_someone and _killed_for_memory() > killed_before
    return Ended(exit_code, timed_out, out_of_memory, time.monotonic() - began - waited, interruption)


def _context() -> multiprocessing.context.ForkServerContext:
    """With its server running."""
    warm_up()
    return multiprocessing.get_context("forkserver")


@contextmanager
def _our_own_path() -> Iterator[None]:
    """What is started here finds our packages where this process has them.

    An interpreter that is started with ``-c``, as the server is, looks into the current folder first, and that is the
    user's, who may have a ``pipeline`` of his own.
    """
    root = str(Path(__file__).resolve().parents[2])
    ours = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def end_all() -> None:
    """Hand Ctrl-C on to the processes of all calls that other threads wait for; they have ``GRACE_S`` to end."""
    running = [process for process in multiprocessing.active_children() if isinstance(process, ForkServerProcess)]
    deadline = time.monotonic() + GRACE_S
    for process in running:
        _tell(process, signal.SIGINT)
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
        _kill_group(process)


def _end(process: ForkServerProcess, number: signal.Signals) -> None:
    _tell(process, number)
    process.join(GRACE_S)


def _tell(process: ForkServerProcess, number: signal.Signals) -> None:
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _kill_group(process: ForkServerProcess) -> None:
    """Nothing of the process's session is left, whatever else is happening."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS's answer for one that has ended
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():  # before it had a session of its own
        process.kill()
    process.join()


def _inside(target: Callable[..., int], arguments: tuple[Any, ...], log: Path, limit_s: float) -> NoReturn:
    """What runs in the new process."""
    os.setsid()  # Ctrl-C on the terminal is the caller's to hand on
    with log.open("ab", buffering=0) as stream, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the server ignores it
    interrupts.install()
    faulthandler.enable()
    faulthandler.dump_traceback_later(limit_s, exit=True)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    try:
        code = target(*arguments)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    sys.exit(interrupts.exit_code(code))


def _end_with_the_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    connection.wait([caller.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


def _killed_for_memory() -> int:
    for counter in OOM_COUNTERS:
        with suppress(OSError):
            for line in Path(counter).read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0
