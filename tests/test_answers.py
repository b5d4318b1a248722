"""What a model costs that is taken home, measured on a real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from serving import save_answering_llama

from benchmarks import answers


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_a_served_answer_is_timed_beside_one_in_process(tmp_path: Path) -> None:
    model = save_answering_llama(tmp_path / "llama")
    small = ["cache=in_engine", "shape.max=200", "shape.exact=[]", "benchmark=none", "tracking.log_model=graph"]
    made = command("pipeline", "model=local", f"model.path={model}", *small, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    folder, to = Path(made.stdout.split()[-1]).parent, tmp_path / "answers.jsonl"

    asked = ["--to", str(to), "--on-cpu", "torch", "--tokens", "12", "--requests", "3"]
    done = command("benchmarks.answers", str(folder), *asked, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    (found,) = map(json.loads, to.read_text().splitlines())
    assert found["tokens"] <= 12 and found["served_ms"] > 0 and found["in_process_ms"] > 0
    assert found["run"]["cache"]["name"] == "in_engine"
    assert json.loads(done.stdout)["tokens"] == found["tokens"]


def test_a_run_that_left_no_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["answers", str(tmp_path), "--to", str(tmp_path / "answers.jsonl")])
    with pytest.raises(SystemExit) as left:
        answers.main()

    assert left.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("runs with a tokenizer leave one, see tracking.log_model")
