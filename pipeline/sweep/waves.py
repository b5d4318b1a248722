"""Several jobs of a sweep at once: each loads, builds and verifies beside the others, and is then timed by itself.

Loading, building and verifying keep a core or two busy and the GPU hardly at all; timing needs the GPU to itself.  So
jobs go in waves: the jobs of one start together, and once every one of them is ready, or has ended, they are timed one
after the other.  Those that have their turn before them, or behind them, wait and launch nothing; that they lie on the
card is in each report (``waiting_processes``).

What fits the card, or the host's memory, by itself may not fit beside the others: a job that fails for that is done
again when they are through.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline.sweep import isolation
from pipeline.sweep.jobs import Job

if TYPE_CHECKING:
    from pipeline.sweep.run import Done, Task


def do(task: Task, jobs: Sequence[Job], at_once: int) -> None:
    """Do ``jobs``, ``at_once`` at a time, and again one by one those that did not fit beside others.  Ctrl-C and
    SIGTERM end those that run, and their rows are kept."""
    crowded_out: list[Done] = []
    try:
        for start in range(0, len(jobs), at_once):
            _wave(task, jobs[start : start + at_once], crowded_out)
        while crowded_out:
            task.do(crowded_out.pop(0).config)
    finally:  # an interruption left them
        for done in crowded_out:
            task.finish(done)


def _wave(task: Task, wave: Sequence[Job], crowded_out: list[Done]) -> None:
    """Do them together; those that did not fit go into ``crowded_out`` and have no row yet."""
    turns = isolation.Turns(len(wave))
    with ThreadPoolExecutor(len(wave)) as pool:
        open_ = {pool.submit(task.attempt, job.config, turns) for job in wave}
        try:
            for future in as_completed(set(open_)):
                open_.discard(future)
                done = future.result()
                if len(wave) > 1 and _short(done):
                    said = f"{task.label(done)}: too little memory beside the others; again by itself"
                    print(said, file=sys.stderr)
                    crowded_out.append(done)
                else:
                    task.finish(done)
        except BaseException:
            turns.cancel()
            isolation.end_all()
            for future in open_:
                with suppress(KeyboardInterrupt):  # each of them says so
                    task.finish(future.result())
            raise


def _short(done: Done) -> bool:
    failure = done.report["failure"]
    interrupted = done.ended is not None and done.ended.interruption is not None
    return failure is not None and failure["kind"] == "out_of_memory" and not interrupted
