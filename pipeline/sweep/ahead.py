"""A sweep's engines, built and verified several at once, ahead of the jobs that time them one by one.

Building keeps a core or two busy and the GPU hardly at all; timing needs the GPU to itself.  Each engine is built in a
process of its own and left in the engine store, where its job finds it.  What goes wrong here is not kept: the job
meets it again, and has the typed row.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from pipeline import reuse
from pipeline.config import Config
from pipeline.console import StageDisplay
from pipeline.sweep import isolation
from pipeline.sweep.attempt import SentLater
from pipeline.sweep.jobs import Job


def build(jobs: Sequence[Job], at_once: int, folder: Path) -> None:
    """Leave the engines of ``jobs`` in the store, ``at_once`` at a time; logs go to ``folder``.

    Ctrl-C and SIGTERM end them all.
    """
    waiting = [job for job in jobs if reuse.applies(job.config) and job.config.reaches("benchmark")]
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        labels = {pool.submit(_build, job.config, folder / job.key[:32]): job.label for job in waiting}
        try:
            for number, future in enumerate(as_completed(labels), 1):
                print(
                    f"built ahead, {number} of {len(waiting)}: {labels[future]}  {future.result():.0f} s",
                    file=sys.stderr,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            isolation.end_all()
            raise


def _build(config: Config, folder: Path) -> float:
    ahead = replace(config, until="verify", output=str(folder))
    ended = isolation.call(_run, (ahead,), folder.with_suffix(".log"), 60 * config.sweep.timeout_minutes)
    shutil.rmtree(folder, ignore_errors=True)
    return ended.seconds


def _run(config: Config) -> int:
    from pipeline.run import run

    run(config, StageDisplay(), lambda *_, **__: SentLater())
    return 0
