"""How runs end, as docs/endings.md says: the real command in processes of its own, and what each leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from commands import Command, Warm, start
from conftest import save_tiny_llama
from rich.console import Console
from runs import DONE
from sweeps import ROOT, Server

from pipeline.__main__ import compose_config
from pipeline.record.console import StageDisplay
from pipeline.record.record import Record
from pipeline.tracking.store import search_runs

RUNNING, KILLED, FAILED, FINISHED = "RUNNING", "KILLED", "FAILED", "FINISHED"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = Warm()
    yield process
    process.close()


class Place:
    """Where a test's runs go, and what they left there."""

    def __init__(self, cwd: Path, model: Path, uri: str) -> None:
        self.cwd, self.uri, self.experiment = cwd, uri, f"{cwd.parent.name}-{cwd.name}"
        self.arguments = (
            "model=local", f"model.path={model}", "shape.max=16", "benchmark=none", f"tracking.uri={uri}",
            f"tracking.experiment={self.experiment}", f"store.folder={cwd}/engines",
        )  # fmt: skip

    def folders(self) -> list[Path]:
        return sorted(self.cwd.glob("outputs/*/*"))

    def files(self, pattern: str) -> list[Path]:
        return list(self.cwd.glob(f"outputs/*/*/{pattern}"))

    def report(self) -> dict[str, Any]:
        """Of the only run."""
        (folder,) = self.folders()
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        return report

    def tracked(self) -> dict[str, Any]:
        """Folder -> its MLflow run."""
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name(self.experiment)
        found = [] if experiment is None else search_runs(client, experiment.experiment_id)
        return {run.data.tags["run_folder"]: run for run in found}

    def status(self) -> str:
        """MLflow's, of the only run."""
        (run,) = self.tracked().values()
        return str(run.info.status)


@pytest.fixture
def place(tmp_path: Path, model: Path, store: str) -> Place:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    return Place(cwd, model, store)


def is_whole(folder: Path, uri: str, tracked: dict[str, Any]) -> str:
    """The run in ``folder`` is over, on disk and in MLflow, and nothing in it is half a file; its status."""
    names = {path.name for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert not {name for name in names if name.endswith(".part") or name.startswith("unfinished")}
    if "engine.trt" in names and report["failure"] is None:
        assert json.loads((folder / "engine.json").read_text())["bytes"] == (folder / "engine.trt").stat().st_size
    kind = (report["failure"] or {}).get("kind")
    expected = KILLED if kind in ("interrupted", "killed") else FAILED if kind else FINISHED
    run = tracked[str(folder.resolve())]
    assert run.info.status == expected and run.data.tags.get("failure.kind") == kind
    return str(report["status"])


# Ctrl-C at any moment


def interrupted(command: Command, place: Place, moment: float, before: set[Path]) -> str:
    """Ctrl-C after ``moment`` seconds of processor time; says how the run ended."""
    command.interrupt_after(moment)
    command.finish()
    seen = f"after {moment:.2f} s: exit code {command.code}\n{command.shown}"
    assert "Traceback" not in command.shown, seen
    new = set(place.folders()) - before
    assert len(new) <= 1 and not place.files("*.part"), seen
    statuses = {is_whole(folder, place.uri, place.tracked()) for folder in new}
    # Past its last line Python takes itself down, and its handlers first: a shell says 130 of that -2 too.
    if command.code in (0, -signal.SIGINT):
        assert len(statuses) == 1 and statuses <= {DONE, "ok"}, seen
        return "over"
    assert command.code == 130, seen
    if not new:
        return "nothing begun"
    # A run that was being closed is closed as what it was.
    return "interrupted" if statuses == {"failed"} else "closed"


def test_ctrl_c_at_four_moments_leaves_a_closed_run_or_none(place: Place, warm: Warm) -> None:
    """The first two fall among the imports, which only a fresh interpreter has."""
    chance = random.Random(13)
    for longest in (1, 4):
        moment, before = chance.uniform(0, longest), set(place.folders())
        interrupted(start(place.cwd, *place.arguments, "until=strategy"), place, moment, before)
    for _ in range(2):
        moment, before = chance.uniform(0, 3), set(place.folders())
        interrupted(warm.start(place.cwd, *place.arguments, "until=strategy"), place, moment, before)


class Whole:
    """A run that nobody interrupts, and the same one again and again."""

    def __init__(self, place: Place) -> None:
        self.place, self.ends, self.processor_s = place, [], 0.0
        command = self.start(0)

        def over() -> bool:
            running = command.running()
            if running:
                self.processor_s = command.processor_s()
            return not running

        command.wait_for(over)
        assert command.finish().code == 0, command.shown

    def start(self, number: int) -> Command:
        return start(self.place.cwd, *self.place.arguments, f"store.folder={self.place.cwd}/engines{number}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, store: str) -> Whole:
    return Whole(Place(tmp_path_factory.mktemp("whole"), model, store))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 41))
def test_ctrl_c_at_a_random_moment_from_the_first_import_to_the_end(whole: Whole, number: int) -> None:
    moment, before = random.uniform(0, whole.processor_s), set(whole.place.folders())
    end = interrupted(whole.start(number), whole.place, moment, before)
    print(f"{moment:.2f} of {whole.processor_s:.2f} s: {end}")
    assert not list(whole.place.cwd.glob("engines*/*.partial"))


@pytest.mark.slow
def test_after_forty_interruptions_no_run_is_left_open(whole: Whole) -> None:
    assert start(whole.place.cwd, *whole.place.arguments, "until=load").finish().code == 0
    assert {run.info.status for run in whole.place.tracked().values()} <= {KILLED, FINISHED}
    assert set(whole.place.tracked()) == {str(folder.resolve()) for folder in whole.place.folders()}


# Left open, and closed by the next start


@dataclass(frozen=True)
class Left:
    """A run that could not be closed: the command, and what it left, before the next start and after."""

    command: Command
    folder: Path
    names: set[str]
    tracked: str
    report: dict[str, Any]


def kill(command: Command) -> None:
    command.send(signal.SIGKILL)


def interrupt_until_it_ends(command: Command) -> None:
    with contextlib.suppress(ProcessLookupError):
        while command.running():
            command.send(signal.SIGINT)
            time.sleep(0.02)


def fill_the_disk(command: Command) -> None:
    command.limit_files(0)


@contextlib.contextmanager
def lost(store: str) -> Iterator[None]:
    """Meanwhile the database is elsewhere."""
    path = Path(store.removeprefix("sqlite:///"))
    away = path.rename(path.with_suffix(".away"))
    yield
    away.rename(path)


def lose_the_store(command: Command) -> None:
    """Nothing: it is :func:`lost` while the command ends."""


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, model: Path, store: str, warm: Warm) -> dict[str, Left]:
    """One start for each way to leave a run open, and a last one; each closes the one before."""
    place = Place(tmp_path_factory.mktemp("left"), model, store)
    found: dict[str, Left] = {}
    known: set[Path] = set()
    for end in (kill, interrupt_until_it_ends, fill_the_disk, lose_the_store):
        command = warm.start(place.cwd, *place.arguments, "until=strategy")
        command.wait_for(lambda: len(place.files("graph_before.txt")) > len(known))
        (folder,) = set(place.folders()) - known
        known.add(folder)
        (folder / "half.txt.part").write_text("half a fi")
        with lost(store) if end is lose_the_store else contextlib.nullcontext():
            end(command)
            command.finish()
        names, tracked = {path.name for path in folder.iterdir()}, place.tracked()[str(folder)].info.status
        found[end.__name__] = Left(command, folder, names, tracked, {})
    last = warm.start(place.cwd, *place.arguments, "until=load").finish()
    assert last.code == 0 and "Traceback" not in last.shown, last.shown
    starts = [*(each.command for each in found.values()), last]
    for (name, each), after in zip(list(found.items()), starts[1:], strict=True):
        done = "was not in MLflow; sent" if "report.json" in each.names else "its process was killed; closed"
        said = f"{each.folder.relative_to(place.cwd)}: {done} now"
        assert said in " ".join(after.shown.split()), (each.command.shown, after.shown)
        is_whole(each.folder, place.uri, place.tracked())
        found[name] = replace(each, report=json.loads((each.folder / "report.json").read_text()))
    return found


def is_left_open(run: Left, code: int) -> None:
    assert run.command.code == code and "Traceback" not in run.command.shown, run.command.shown
    assert "unfinished.lock" in run.names and run.tracked == RUNNING


@pytest.mark.parametrize(("end", "code"), [("kill", -signal.SIGKILL), ("fill_the_disk", 1)])
def test_a_run_that_could_not_leave_a_report_is_closed_by_the_next_start_with_what_it_had_measured(
    end: str, code: int, left: dict[str, Left]
) -> None:
    run = left[end]
    is_left_open(run, code)
    assert "unfinished.json" in run.names and "report.json" not in run.names

    failure = run.report["failure"]
    assert failure["kind"] == "killed" and failure["stage"] in ("export", "strategy")
    assert f"process {run.command.pid} on " in failure["message"]
    assert run.report["stages_s"]["load"] > 0 and run.report["environment"]["python"] == platform.python_version()


def test_a_second_ctrl_c_ends_the_run_at_once_and_the_next_start_closes_it(left: dict[str, Left]) -> None:
    run = left["interrupt_until_it_ends"]
    is_left_open(run, 130)
    # The first one may have got as far as writing the report.
    assert run.report["failure"]["kind"] == ("interrupted" if "report.json" in run.names else "killed")


def test_a_run_whose_store_is_lost_in_the_middle_is_done_and_the_next_start_sends_it(left: dict[str, Left]) -> None:
    run = left["lose_the_store"]
    is_left_open(run, 0)
    said = " ".join(run.command.shown.split())
    assert said.count("is incomplete") == 1 and "the next start with this output and this store sends" in said
    assert run.report["status"] == "ok" and "report.json" in run.names


def test_a_report_that_the_disk_does_not_take_is_printed(left: dict[str, Left]) -> None:
    shown = left["fill_the_disk"].command.shown
    printed = json.loads(shown[shown.index("{\n") : shown.rindex("\n}") + 2])
    assert printed["status"] == "failed" and printed["failure"]["kind"] == "disk"
    assert "report.json: File too large" in shown
    assert printed["stages_s"]["load"] == left["fill_the_disk"].report["stages_s"]["load"]


# Full disks


@pytest.mark.slow
def test_an_engine_that_the_disk_does_not_take_is_a_failure_that_names_it_and_no_part_of_it_stays(
    place: Place, warm: Warm
) -> None:
    command = warm.start(place.cwd, *place.arguments, "until=build")
    command.wait_for(lambda: place.files("graph_after.txt"))
    command.limit_files(2 << 20)  # the engine has 3 MB
    command.finish()

    (folder,) = place.folders()
    assert command.code == 1 and "Traceback" not in command.shown, command.shown
    failure = place.report()["failure"]
    assert failure == {
        "stage": "build",
        "kind": "disk",
        "message": f"File too large: {folder.relative_to(place.cwd)}/engine.trt",
    }
    assert not place.files("engine*") and place.files("graph_after.txt")
    is_whole(folder, place.uri, place.tracked())


# Nothing may be written


def read_only(path: Path) -> None:
    path.chmod(path.stat().st_mode & ~0o222)


def test_a_read_only_store_or_output_is_refused_in_one_line_and_nothing_is_created(
    place: Place, warm: Warm, tmp_path: Path, store: str
) -> None:
    database, output = tmp_path / "mlflow.db", tmp_path / "output"
    shutil.copy(store.removeprefix("sqlite:///"), database)
    output.mkdir()
    for path, setting in ((database, f"tracking.uri=sqlite:///{database}"), (output, f"output={output}")):
        read_only(path)
        command = warm.start(place.cwd, *place.arguments, setting).finish()
        assert command.code == 2 and command.shown.count("\n") == 1, command.shown
        assert command.shown.startswith(f"error: {setting}: cannot be "), command.shown
    assert place.folders() == [] and list(output.iterdir()) == [] and list(place.cwd.iterdir()) == []


# A server that goes


@pytest.mark.slow  # the store that is lost above, and a sweep's server in test_sweep_server.py, are quicker
def test_a_run_whose_server_is_lost_in_the_middle_is_done_and_the_next_start_sends_it(
    place: Place, warm: Warm, store: str, tmp_path: Path
) -> None:
    pytest.importorskip("flask", reason="mlflow-skinny cannot serve")
    server = Server(tmp_path / "server")
    shutil.copy(store.removeprefix("sqlite:///"), server.folder / "server.db")
    place.uri = server.uri
    arguments = (*place.arguments, f"tracking.uri={server.uri}")
    try:
        server.start()
        command = warm.start(place.cwd, *arguments, "until=strategy")
        command.wait_for(lambda: place.files("graph_before.txt"))
        server.kill()
        command.finish()

        (folder,) = place.folders()
        said = " ".join(command.shown.split())
        assert command.code == 0 and "Traceback" not in said and place.report()["failure"] is None, command.shown
        assert said.count("is incomplete") == 1 and "the next start with this output and this store sends" in said

        server.start()
        again = warm.start(place.cwd, *arguments, "until=load").finish()
        assert again.code == 0 and "was not in MLflow; sent now" in " ".join(again.shown.split()), again.shown
        assert is_whole(folder, server.uri, place.tracked()) == "ok"
    finally:
        server.kill()


# Out of memory


def test_memory_that_torch_does_not_get_on_the_cpu_is_no_internal_error(model: Path) -> None:
    import torch

    record = Record(compose_config(["model=local", f"model.path={model}"]), StageDisplay(Console(file=io.StringIO())))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    record.fail(caught.value)
    assert record.report.failure is not None and record.report.failure.kind == "out_of_memory"


# The handler by itself

DURING_AN_IMPORT = """
import time
from pipeline.host import interrupts
interrupts.install()
import interrupted_meanwhile
try:
    interrupts.check()
except KeyboardInterrupt:
    pass
code = interrupts.exit_code(0)
time.sleep(3 * interrupts.RETRY_S)  # the second look at the signal
raise SystemExit(code)
"""
IN_A_DEL = """
import os, signal, time
from pipeline.host import interrupts
class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
interrupts.install()
try:
    Dropping()
    time.sleep(20)
except KeyboardInterrupt:
    raise SystemExit(interrupts.exit_code(0))
"""
IN_AN_INIT = """
import os, signal, time
from pipeline.host import interrupts
class Half:
    def __init__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
        self.owner = True
    def __del__(self):
        assert self.owner
interrupts.install()
try:
    Half()
except KeyboardInterrupt:
    pass
raise SystemExit(interrupts.exit_code(0))
"""


@pytest.mark.parametrize(
    "program", [DURING_AN_IMPORT, IN_A_DEL, IN_AN_INIT], ids=["during an import", "in a __del__", "in an __init__"]
)
def test_ctrl_c_that_python_would_drop_ends_with_its_own_code_and_without_a_traceback(
    program: str, tmp_path: Path
) -> None:
    (tmp_path / "interrupted_meanwhile.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=15,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
