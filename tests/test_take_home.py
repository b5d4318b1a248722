"""A run's model away from the run: by the tracking server's address alone, by a registry's alias, and at a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import do
from serving import Server as ModelServer
from serving import asked, save_answering_llama, served, several_at_once
from sweeps import ROOT, Server, free_port

from pipeline import chat
from pipeline.deploy.opened import Opened, open_model
from pipeline.deploy.request import read
from pipeline.run import Outcome
from pipeline.sweep import registry
from pipeline.sweep.jobs import Row
from pipeline.sweep.tracking import Parent
from pipeline.tracking import runs
from pipeline.tracking.runs import FOLDER

CACHED = ["cache=in_engine", "shape.max=200", "shape.exact=[]", "benchmark=none", "tracking.log_model=graph"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tracking server that keeps the artifacts itself: who has its address needs no other."""
    pytest.importorskip("flask", reason="mlflow-skinny cannot serve")
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def outcome(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run with a KV cache that the server has."""
    folder = tmp_path_factory.mktemp("run")
    done = do(server.uri, folder / "outputs", save_answering_llama(folder / "llama"), *CACHED)
    assert done.report["failure"] is None
    return done


@pytest.fixture(scope="module")
def opened(outcome: Outcome) -> Opened:
    return open_model(outcome.folder / "model" / "data" / "chat", "torch", "", lambda _: None)


def said(opened: Opened, *messages: str, tokens: int) -> str:
    """The answer to the last of ``messages``, which the user and the model said in turns."""
    roles = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    return opened.answerer.answer(read({"messages": roles, "max_tokens": tokens}, opened.answerer.settings)).text


def registered(uri: str, outcome: Outcome, run_id: str) -> Any:
    """The registry's version of a run, once a sweep has entered it.

    Only what was executed is entered.  That no CPU can do: the report says so here, and the engine is never opened."""
    from mlflow import MlflowClient

    report = json.loads((outcome.folder / "report.json").read_text())
    report["verify"]["executed"] = "engine"
    rows = {"job": Row("job", "job", "", False, 1.0, run_id)}
    for _ in range(2):  # the second time as a sweep that is resumed does
        registry.register(Parent(uri, "0", ""), rows, {"job": report})
    (version,) = MlflowClient(uri).search_model_versions("name='llama'")
    assert version.source == f"runs:/{run_id}/model" and version.run_id == run_id
    return version


@pytest.mark.slow
@pytest.mark.parametrize("named", ["folder", "run id"])
def test_what_the_model_says_alone_is_on_standard_output(
    named: str, server: Server, outcome: Outcome, opened: Opened, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    for name in ("OMP_WAIT_POLICY", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, os.environ.get(name, "3"))  # what the command sets goes with the test
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = {"folder": str(outcome.folder), "run id": outcome.report["mlflow"]["run_id"]}[named]
    assert chat.main([run, "--on-cpu", "torch", "--once", "hello", "--max-tokens", "6"]) == 0
    out, err = capfd.readouterr()
    assert out == said(opened, "hello", tokens=6) + "\n"
    assert "(6 tokens in " in err and "tokens/s" in err and "Downloading" not in err


def test_an_alias_of_the_registry_is_loaded_by_mlflow_itself(
    outcome: Outcome, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an SQLite store, with its files beside it."""
    import mlflow

    from pipeline.__main__ import compose_config

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with runs.start(compose_config([f"tracking.uri={uri}"]), outcome.folder) as run:
        assert run.finish(outcome.report, outcome.folder)
    registered(uri, outcome, run.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = mlflow.pyfunc.load_model("models:/llama@smallest", model_config={"on_cpu": "torch"})
    answer = model.predict({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6})
    assert answer["choices"][0]["message"]["content"] == said(opened, "hello", tokens=6)
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}


def test_both_engines_of_a_generation_come_back_with_their_hashes_checked(
    server: Server, outcome: Outcome, tmp_path: Path
) -> None:
    run_id = outcome.report["mlflow"]["run_id"]
    engine = runs.fetch_engine(run_id, server.uri, tmp_path / "there", graph_suffices=True)
    there = {path.name: path.read_bytes() for path in engine.parent.iterdir()}
    assert there == {
        name: (outcome.folder / name).read_bytes()
        for name in ("engine.trt", "engine.json", "decode.trt", "decode.json")
    }


QUESTIONS = ("hello", "What is 2 + 2?", "Grüße", "say 世界", "a", "why not? " * 6, "0123456789", "Name a colour.")

WRONG: list[tuple[Any, str]] = [
    ({"max_tokens": 4}, "Request payload"),
    ({}, "Request payload"),
    ({"messages": []}, "messages=[]: must be a list of at least one message"),
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages='hello'"),
    ({"messages": [5]}, "messages[0]=5: must be an object"),
    (
        {"messages": [{"role": "robot", "content": "x"}]},
        "messages[0].role='robot': allowed are system",
    ),
    ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role=3"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content=5"),
    ({"messages": [{"role": "user"}]}, "messages[0].content=None"),
    (asked("x", max_tokens=10**6), "max_tokens=1000000: behind 6 tokens of messages there is room for 250 more"),
    (asked("x" * 250), "messages: they are 255 tokens, and the engine takes from 2 to 200"),
    (asked("x", max_tokens=-1), "max_tokens=-1"),
    (asked("x", max_tokens="4"), "max_tokens='4'"),
    (asked("x", max_tokens=2.5), "max_tokens=2.5"),
    (asked("x", temperature=float("nan")), "temperature=nan: must be a finite number"),
    (asked("x", temperature="hot"), "temperature='hot'"),
    (asked("x", temperature=-0.5), "temperature=-0.5"),
    (asked("x", seed="one"), "seed='one'"),
    ("{", "valid JSON"),
]


@pytest.mark.slow
def test_two_hundred_requests_leave_the_server_as_it_was(server: Server, outcome: Outcome, tmp_path: Path) -> None:
    right = [asked(QUESTIONS[i % len(QUESTIONS)], max_tokens=(4, 9, 15)[i % 3]) for i in range(180)]
    registered(server.uri, outcome, outcome.report["mlflow"]["run_id"])
    with served("models:/llama@smallest", server.uri, tmp_path) as model:
        model.wait()
        several_at_once(model, right[:24], WRONG, at_once=8)  # what it keeps, it has by now
        family = psutil.Process(model.process.pid).children(recursive=True)
        worker = max(family, key=lambda process: process.memory_info().rss)
        before, threads = worker.memory_info().rss, worker.num_threads()
        began = time.perf_counter()
        several_at_once(model, right, WRONG, at_once=8)
        seconds, after = time.perf_counter() - began, worker.memory_info().rss
        print(f"224 requests in {seconds:.0f} s, {before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")
        assert len(WRONG) == 20 and after < 1.02 * before and worker.num_threads() <= threads
        assert worker.cpu_percent(interval=2) < 20, "something is left running"
        drawn = [asked("hello", max_tokens=12, temperature=1.5, seed=seed) for seed in (1, 2, 1)]
        first, second, again = (model.ask(request)[1]["choices"] for request in drawn)
        assert first == again != second
    assert psutil.wait_procs(family, timeout=10)[1] == []


def of_the_readme(**known: str) -> list[str]:
    """The commands of its section, with what a reader puts in."""
    section = (ROOT / "README.md").read_text().partition("## Take it home")[2]
    text = section.partition("```sh\n")[2].partition("```")[0]
    for place, value in known.items():
        assert place in text
        text = text.replace(place, value)
    return text.splitlines()


@pytest.mark.slow
def test_four_commands_lead_from_a_sweep_to_an_answer_on_another_machine(server: Server, tmp_path: Path) -> None:
    """As the README has them; a CPU needs ``log_model=graph`` behind the first, and ``on_cpu``.  The other machine has
    another home, another folder and the server's address."""
    pytest.importorskip("flask")
    model = save_answering_llama(tmp_path / "llama")
    there, here = tmp_path / "there", tmp_path / "here"
    for place in (there / "home", here / "home"):
        place.mkdir(parents=True)
    port = str(free_port())
    known = {"http://HOST:PORT": server.uri, "5001": port}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}

    sweep, *_ = of_the_readme(**known)
    small = f"model=local model.path={model} shape.max=200 shape.exact=[] benchmark=none tracking.log_model=graph"
    on_gpu = environment | {"HOME": str(there / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(f"{sweep} {small}", shell=True, cwd=there, env=on_gpu, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    from mlflow import MlflowClient

    client = MlflowClient(server.uri)  # all that a colleague knows
    experiment = client.get_experiment_by_name("proved-attention")
    assert experiment is not None
    found = [run for run in client.search_runs([experiment.experiment_id]) if run.data.params.get("cache.name")]
    sweeps = {run.data.params["cache.name"]: run.info.run_id for run in found if FOLDER in run.data.tags}
    answers = {}
    elsewhere = {key: value for key, value in environment.items() if key not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    elsewhere |= {"HOME": str(here / "home"), "SERVING_MODEL_CONFIG": '{"on_cpu": "torch"}'}
    for cache in ("static", "in_engine"):
        _, export, serve, *ask = of_the_readme(**known, RUN_ID=sweeps[cache])
        with (here / "serve.log").open("w") as log:
            command = f"{export}\n{serve}"
            process = subprocess.Popen(
                command, shell=True, cwd=here, env=elsewhere, stdout=log, stderr=log, start_new_session=True
            )
        try:
            ModelServer(process, f"http://127.0.0.1:{port}", here / "serve.log").wait()
            asking = "\n".join(ask)
            said = subprocess.run(
                asking, shell=True, cwd=here, env=elsewhere, capture_output=True, text=True, check=True
            )
            answers[cache] = json.loads(said.stdout)["choices"][0]["message"]["content"]
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
        talk = f"{export}\npython -m pipeline.chat {sweeps[cache]} --on-cpu torch --once Hi"
        spoken = subprocess.run(
            talk, shell=True, cwd=here, env=elsewhere | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert spoken.returncode == 0, spoken.stderr
        assert spoken.stdout == answers[cache] + "\n"
    assert answers["static"] == answers["in_engine"] != ""
    assert [path.name for path in here.iterdir() if path.name not in ("home", "serve.log")] == [], (
        "nothing is left there"
    )


class Terminal:
    """``python -m pipeline.chat`` at a terminal of its own."""

    def __init__(self, cwd: Path, *arguments: str) -> None:
        self.shown = ""
        command = [sys.executable, "-m", "pipeline.chat", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(cwd)}
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(command[0], command, environment)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def until(self, text: str, seconds: float = 240) -> str:
        """What is shown up to ``text``, behind what was looked at before."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"no {text!r} in {self.shown!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                try:
                    self.shown += os.read(self._terminal, 4096).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # it has ended
                    assert text in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def ended(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.fixture
def terminal(server: Server, outcome: Outcome, tmp_path: Path) -> Iterator[Terminal]:
    """A colleague's, who has the server's address and an alias: nothing of the run is in this folder and home."""
    registered(server.uri, outcome, outcome.report["mlflow"]["run_id"])
    asked = ("--uri", server.uri, "--on-cpu", "torch", "--max-tokens", "30")
    terminal = Terminal(tmp_path, "models:/llama@smallest", *asked)
    yield terminal
    terminal.kill()


def test_a_conversation_goes_on_behind_an_answer_that_ctrl_c_ended(terminal: Terminal, opened: Opened) -> None:
    first = said(opened, "hello", tokens=30)
    terminal.until("> ")
    terminal.type("\x03")
    terminal.until("(Ctrl-D ends the conversation)\n> ")
    terminal.type("hello\n")
    assert terminal.until(" tokens/s, cut off)\n> ").startswith(f"hello\n{first}\n(30 tokens in ")
    terminal.type("more\n")
    second = said(opened, "hello", first, "more", tokens=30)
    assert second != said(opened, "more", tokens=30)
    assert terminal.until(" tokens/s, cut off)\n> ").startswith(f"more\n{second}\n(")

    third = said(opened, "hello", first, "more", second, "again", tokens=30)
    terminal.type("again\n")
    begun = terminal.until("again\n") + terminal.until(third[0])
    terminal.type("\x03")
    begun += terminal.until("(ended)\n> ")
    assert begun.startswith("again\n") and len(begun) < len("again\n\n(ended)\n> ") + len(third), begun
    terminal.type("again\n")  # what was cut off is not part of it
    assert terminal.until(" tokens/s, cut off)\n> ").startswith(f"again\n{third}\n(")
    terminal.type("\x04")
    assert terminal.ended() == 0 and "Downloading" not in terminal.shown
