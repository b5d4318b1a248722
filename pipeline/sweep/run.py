"""A sweep, from its jobs to its table: skip what is finished, do the rest one by one, and leave nothing open."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from passes.errors import UserError
from pipeline.config.compose import from_hydra
from pipeline.config.overrides import typed
from pipeline.config.schema import Config
from pipeline.host import interrupts
from pipeline.host.files import check_output, locked, write_text
from pipeline.record.report import write_json
from pipeline.sweep import isolation, registry, table, tracking, waves
from pipeline.sweep.attempt import attempt, settle
from pipeline.sweep.display import line, live
from pipeline.sweep.jobs import Job, Row, at, headline, read_report, read_rows, write_row
from pipeline.sweep.keys import Commits, content_key, pinned, settings_key, surroundings, sweep_key
from pipeline.sweep.ledger import Entry, Ledger
from pipeline.tracking.names import job_name
from pipeline.tracking.recovery import recover
from pipeline.tracking.store import check_store


@dataclass(frozen=True)
class Done:
    """A job that is over; ``ended``: its process, None where the job had been finished before."""

    config: Config
    job: str
    entry: Entry
    report: dict[str, Any]
    ended: isolation.Ended | None


@dataclass(frozen=True)
class Task:
    """Does one job of a sweep.  It can be pickled: Hydra's launchers call it in processes, and on machines, of their
    own; the ledger, which lies on disk, is what they share."""

    parent: tracking.Parent
    folder: Path
    """The sweep's."""
    labels: Mapping[str, str]
    fixed: frozenset[str] = frozenset()
    """Settings that the command gives one value: they tell no job from another."""
    surroundings: str | None = None
    """Those of the machine that it runs on; None: another than the one that made the task."""
    commits: Commits = field(default_factory=Commits)

    def __call__(self, composed: DictConfig) -> float | None:
        """What Hydra calls: the job's objective, None where it has none."""
        try:
            config = from_hydra(composed)
        except UserError as error:  # of a job that only the sweeper knew
            print(f"✗ {self._chosen()}  refused: {error}", file=sys.stderr)
            return None
        report = self.do(config)
        path = config.sweep.objective or headline(report)
        value = at(report, path) if path and report["status"] != "failed" else None
        return float(value) if isinstance(value, int | float) else None

    def do(self, config: Config) -> dict[str, Any]:
        """Do the job, unless it is finished; keep its row, and return its report."""
        return self.finish(self.attempt(config))

    def attempt(self, config: Config, turns: isolation.Turns | None = None) -> Done:
        """Do the job, unless it is finished."""
        interrupts.check()
        job, ledger = settings_key(config), Ledger(Path(config.output))
        key = content_key(config, self.surroundings or surroundings(), self.commits)
        config = pinned(config, self.commits)
        finished = None if config.rerun else ledger.finished(key)
        if finished is not None:
            if turns is not None:
                turns.leave(asked=False)
            return Done(config, job, *finished, None)
        name, log = uuid.uuid4().hex, self.folder / "logs" / f"{job[:32]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        ended = isolation.call(attempt, (config, key, name), log, 60 * config.sweep.timeout_minutes, turns)
        return Done(config, job, *settle(config, key, name, ended, log), ended)

    def finish(self, done: Done) -> dict[str, Any]:
        """Send the job's report, keep its row and say how it went; returns the report."""
        entry, report, ended = done.entry, done.report, done.ended
        assert entry.folder is not None
        label = self.label(done)
        folder, seconds = Path(done.config.output) / entry.folder, 0.0 if ended is None else ended.seconds
        run_id = tracking.send(self.parent, done.config, done.job, folder, report, entry.started, job_name(label))
        write_row(self.folder / "rows", Row(done.job, label, str(folder), ended is None, seconds, run_id))
        print(line(label, report, folder, seconds, ended is None), file=sys.stderr)
        if ended is not None and ended.interruption is not None:
            raise ended.interruption
        return report

    def label(self, done: Done) -> str:
        return self.labels.get(done.job) or self._chosen()

    def _chosen(self) -> str:
        """What Hydra's sweeper chose for the job that it is calling."""
        given = map(typed, HydraConfig.get().overrides.task)
        return " ".join(override for override in given if override.partition("=")[0] not in self.fixed)


def sweep(
    config: Config, jobs: Sequence[Job] | None, identity: str, launch: Callable[[Task, Path], None] | None
) -> int:
    """Do ``jobs``, or what ``launch`` makes of them, and return the exit code: 1 where any failed.

    ``config`` is any of theirs: they agree on where everything goes.  ``jobs`` is None where only Hydra's sweeper
    knows them, as they come; ``identity`` then stands for them.  Raises :class:`UserError`, with nothing created.
    """
    here, commits = surroundings(), Commits()
    if config.sweep.builders > 1 and launch is not None:
        raise UserError(f"sweep.builders={config.sweep.builders}: leave it out where Hydra's plugins place the jobs")
    keys = {job.key: content_key(job.config, here, commits) for job in jobs or ()}
    key = sweep_key([identity, here] if jobs is None else keys.values())
    output = Path(config.output)
    folder = output / "sweeps" / key[:12]
    check_store(config.tracking.uri)
    check_output(config.output)
    with _only_one(output):
        labels = {job.key: job.label for job in jobs or ()}
        ledger = Ledger(output)
        left = [job for job in jobs or () if config.rerun or not ledger.finished(keys[job.key])]
        if launch is None and left:
            isolation.warm_up()
        parent = tracking.open_parent(config, key, f"sweep of {len(jobs)} jobs" if jobs else "sweep")
        recover(config, lambda message: print(f"! {message}", file=sys.stderr))
        shutil.rmtree(folder / "rows", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        task = Task(parent, folder, labels, surroundings=here if launch is None else None, commits=commits)
        status = "KILLED"
        try:
            with live(folder / "rows", None if jobs is None else len(jobs)):
                if launch is not None:
                    launch(task, folder)
                else:
                    together = left if config.sweep.builders > 1 else []
                    for job in jobs or ():
                        if job not in together:
                            task.do(job.config)
                    waves.do(task, together, config.sweep.builders)
            status = "FINISHED"
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on with the jobs that are left", file=sys.stderr)
            raise
        finally:
            with interrupts.held():
                failed = _close(config, task, labels, status)
    return 1 if failed else 0


def _close(config: Config, task: Task, labels: Mapping[str, str], status: str) -> bool:
    """Leave the table on disk, on the console and in MLflow; whether any job failed."""
    rows = read_rows(task.folder / "rows")
    reports = {key: read_report(row) for key, row in rows.items()}
    folders = {key: Path(row.folder) for key, row in rows.items()}
    baseline = config.sweep.baseline
    ratios = table.speed_ups(reports, folders, baseline) if baseline else {}
    entries = table.entries({**labels, **{key: row.label for key, row in rows.items()}}, rows, reports, ratios)
    write_json(task.folder / "summary.json", {"sweep": task.folder.name, "baseline": baseline, "jobs": entries})
    shown, shown_in = table.markdown(entries, baseline), task.folder / "summary.md"
    write_text(shown_in, shown)

    lost = [entry for entry in entries if status == "FINISHED" and entry["status"] == "not_done"]
    failed = [entry for entry in entries if entry["status"] == "failed"]
    skipped = sum(row.skipped for row in rows.values())
    counted = {"jobs": len(entries), "jobs.failed": len(failed), "jobs.skipped": skipped}
    numbers = {task.parent.run_id: {name: float(count) for name, count in counted.items()}}
    for key, (ratio, low, high) in ratios.items():
        if (run_id := rows[key].run_id) is not None:
            numbers[run_id] = {"speed_up": ratio, "speed_up.ci95.low": low, "speed_up.ci95.high": high}
    page = _page(task.folder, rows, baseline)
    files = [task.folder / "summary.json", shown_in, *page]
    ended = "FAILED" if (failed or lost) and status == "FINISHED" else status
    sent = tracking.close_parent(task.parent, files, shown, numbers, ended)
    if config.tracking.register and status == "FINISHED" and sent:
        registry.register(task.parent, rows, reports)
    unsent = [row for row in rows.values() if row.run_id is None]

    print(f"\n{len(rows) - len(failed)} of {len(entries)} jobs done", file=sys.stderr)
    if untimed := sum(entry["status"] == "not_executed" for entry in entries):
        print(f"{untimed} of them {table.NOT_EXECUTED}", file=sys.stderr)
    for entry in failed:
        print("  ✗ {job}: {stage}: {kind}: {message}".format(**entry, **entry["failure"]), file=sys.stderr)
    for entry in lost:
        print(f"  ✗ {entry['job']}: its worker left no report", file=sys.stderr)
    if unsent or not sent:
        print(f"{len(unsent)} reports are not in MLflow yet; the same command sends them", file=sys.stderr)
    for path in (shown_in, *page[:1]):
        print(path, file=sys.stderr)
    return bool(failed or lost)


def _page(folder: Path, rows: Mapping[str, Row], baseline: str | None) -> list[Path]:
    """The comparison page of the jobs, see :mod:`pipeline.compare`; none where there is nothing to compare.  Where
    every job had been done before, the page is there, and is not worth a second."""
    html = folder / "comparison.html"
    if not (html.is_file() and all(row.skipped for row in rows.values())):
        from pipeline.compare.__main__ import write_page

        try:
            write_page([Path(row.folder) for row in rows.values()], html, baseline)
        except UserError as error:
            print(f"no comparison page: {error}", file=sys.stderr)
            return []
    return [html, html.with_suffix(".md")]


@contextmanager
def _only_one(output: Path) -> Iterator[None]:
    """Sweeps over one folder would do each other's jobs."""
    lock_file = output / "sweeps" / ".lock"
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock_file, timeout_s=0))
        except TimeoutError:
            raise UserError(
                f"output={output}: another sweep is running there; wait for it, or take another folder"
            ) from None
        except OSError as error:
            raise UserError(f"output={output}: cannot be written ({error.strerror})") from None
        try:
            yield
        except UserError:  # nothing was begun, so nothing stays
            lock_file.unlink()
            for folder in (lock_file.parent, output):
                with suppress(OSError):  # it holds more
                    folder.rmdir()
            raise
