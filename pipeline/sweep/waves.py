"""Several jobs of a sweep at once: each loads, builds and verifies beside the others, and is then timed by itself.

Loading, building and verifying keep a core or two busy and the GPU hardly at all; timing needs the GPU to itself.  So
jobs go in waves: the jobs of one start together, and once every one of them is ready, or has ended, they are timed one
after the other.  Those that have their turn before them, or behind them, wait and launch nothing; that they lie on the
card is in each report (``waiting_processes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline.sweep import isolation
from pipeline.sweep.jobs import Job

if TYPE_CHECKING:
    from pipeline.sweep.run import Task


def do(task: Task, jobs: Sequence[Job], at_once: int) -> None:
    """Do ``jobs``, ``at_once`` at a time.  Ctrl-C and SIGTERM end those that run, and their rows are kept."""
    for start in range(0, len(jobs), at_once):
        wave = jobs[start : start + at_once]
        turns = isolation.Turns(len(wave))
        with ThreadPoolExecutor(len(wave)) as pool:
            open_ = {pool.submit(task.attempt, job.config, turns) for job in wave}
            try:
                for future in as_completed(set(open_)):
                    open_.discard(future)
                    task.finish(future.result())
            except BaseException:
                turns.cancel()
                isolation.end_all()
                for future in open_:
                    with suppress(KeyboardInterrupt):  # each of them says so
                        task.finish(future.result())
                raise
