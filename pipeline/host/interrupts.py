"""Ctrl-C and SIGTERM: what was asked for is remembered, so that no library can lose it.

The exception of a signal rises wherever Python happens to be.  In a callback out of C++, a ``__del__``, a callback of a
weak reference or somebody's ``except BaseException`` it is dropped, and the program goes on as if nothing had been
said.  So the handler keeps the number, and the run asks for it between and within its stages (:func:`check`).  Where
Python itself drops it, it says so (``sys.unraisablehook``): nothing is printed then, and it rises again.  An object
that it cut while it was made is no whole one, and what its ``__del__`` then misses is not printed either.

Imports are where that happened: torch's C++ imports numpy and takes every error for "there is no numpy", and
``torch.distributed`` aborts.  So no import is cut in two: the exception rises when the outermost one is done.

The handler is its own state and stands where every handler does, in the process's table of signals: where none was
installed (a notebook, a test), all of this does nothing and Python's own Ctrl-C is what it was.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

RETRY_S = 0.1
"""After which a signal that came during an import, or was dropped, is looked at again."""


class CtrlC(KeyboardInterrupt):
    """Ctrl-C.  A class of its own, because CPython remembers that a plain KeyboardInterrupt has left an ``exec()`` of a
    text, as dataclasses use it, and then ends by the signal whatever code ``sys.exit`` was given (``Py_RunMain``)."""


class _Handler:
    """The first signal unwinds the stack, so that the run that it ends is closed and reported.  A Ctrl-C after any
    other ends the process at once; a SIGTERM after any other is the same wish again."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.raised = False
        self.holding = 0
        self.over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.over or (self.asked is not None and number == signal.SIGINT):
            _end_at_once(self.asked or number)
        self.asked = self.asked or number
        if self.raised or self.holding:
            return
        if _importing(frame):
            self.later()
        else:
            self.check()

    def later(self) -> None:
        self.raised = False
        again = threading.Timer(RETRY_S, _ask_again)
        again.daemon = True
        again.start()

    def check(self) -> None:
        self.raised = self.asked is not None  # so that the second look at a signal does not raise it once more
        if self.asked == signal.SIGINT:
            raise CtrlC
        if self.asked is not None:
            raise SystemExit(128 + self.asked)


def install() -> None:
    """Handle SIGTERM, and SIGINT where it is not ignored, as a shell has it for what runs in the background."""
    handler = _Handler()
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    show = sys.unraisablehook

    def dropped(what: Any) -> None:
        if handler.asked is None:
            show(what)
        elif isinstance(what.exc_value, CtrlC | SystemExit) and not handler.over:
            handler.later()

    sys.unraisablehook = dropped


def check() -> None:
    """Raise again what a signal asked for and somebody dropped."""
    if (handler := _installed()) is not None:
        handler.check()


def asked() -> BaseException | None:
    """What a signal asked for, as the exception that it raised; None: nothing."""
    try:
        check()
    except (CtrlC, SystemExit) as error:
        return error
    return None


@contextmanager
def held() -> Iterator[None]:
    """What must not be cut in two: a signal that comes meanwhile is raised at the end of the block."""
    handler = _installed() or _Handler()
    handler.holding += 1
    try:
        yield
    finally:
        handler.holding -= 1
    if not handler.holding:
        handler.check()


@contextmanager
def allowed() -> Iterator[None]:
    """Inside of :func:`held`: what may be cut, as the work between the opening and the closing of a run."""
    handler = _installed() or _Handler()
    before, handler.holding = handler.holding, 0
    try:
        handler.check()
        yield
    finally:
        handler.holding = before


def exit_code(code: int) -> int:
    """The exit code of a program that is done: 128 and the signal's number where there was one, else ``code``.  What
    comes from now on ends the process at once: nothing is left to be closed."""
    if (handler := _installed()) is None:
        return code
    handler.over = True
    return code if handler.asked is None else 128 + handler.asked


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _installed() -> _Handler | None:
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, _Handler) else None


def _ask_again() -> None:
    """As a signal, since nothing else wakes what sleeps in the system; where nobody handles it, nobody asked."""
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _end_at_once(number: int) -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # the cursor, which the display of the stages hides
    os._exit(128 + number)
