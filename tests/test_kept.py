"""A limit for all engines: those of runs, of MLflow and of the store, which are one file each under many names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.host.files import LINKED_BYTES, locked, share
from pipeline.kept.__main__ import main
from pipeline.kept.engines import found
from pipeline.record.unfinished import STATE
from pipeline.store.entries import Store

MIB = 2**20
SIZE = 2 * MIB


def a_run(folder: Path, number: int, *names: str) -> Path:
    """A run's folder with engines of :data:`SIZE`, built on day ``number``."""
    folder.mkdir(parents=True)
    for name in names or ("engine.trt",):
        (folder / name).write_bytes(bytes([number]) * SIZE)
        (folder / name).with_suffix(".json").write_text("{}")
        os.utime(folder / name, (number * 86400, number * 86400))
    (folder / "report.json").write_text("{}")
    return folder


def linked(source: Path, target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        share(path, target / path.name)
    return target


@pytest.fixture
def machine(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Four runs; an SQLite store has the first, to which an alias points, and the second; the engine store the second
    and the third."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    shutil.copy(migrated, "mlflow.db")
    runs = [a_run(tmp_path / "outputs" / "day" / f"run{i}", i + 1) for i in range(3)]
    runs.append(a_run(tmp_path / "outputs" / "day" / "run3", 4, "engine.trt", "decode.trt", "engine.pt2"))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("engines", artifact_location=(tmp_path / "mlartifacts" / "engines").as_uri())
    places = {f"run{i}": run for i, run in enumerate(runs)}
    for i in (0, 1):
        info = client.create_run(experiment).info
        places[f"tracked{i}"] = linked(runs[i], Path(info.artifact_uri.removeprefix("file://")))
        if i == 0:
            client.create_registered_model("llama")
            version = client.create_model_version("llama", f"runs:/{info.run_id}/model", info.run_id)
            client.set_registered_model_alias("llama", "fastest", version.version)
    store = Store(tmp_path / "engines", 2**40)
    store.root.mkdir()
    for i in (1, 2):
        with store.locked(f"key{i}", print):
            store.commit(f"key{i}", [runs[i] / "engine.trt", runs[i] / "engine.json"], {"number": i})
        places[f"stored{i}"] = store.entry(f"key{i}")
        os.utime(places[f"stored{i}"] / "stored.json", (i * 86400, i * 86400))
    return places


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["--store", "engines", *arguments])
    return (code, *capsys.readouterr())


def test_an_engine_is_counted_once_however_many_names_it_has(
    machine: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = found([Path("outputs"), Path("mlartifacts"), Path("engines")])
    assert [each.bytes for each in kept] == [SIZE, SIZE, SIZE, 3 * SIZE]
    assert [len(each.folders) for each in kept] == [2, 3, 2, 1]
    code, said, _ = command(capsys)
    assert code == 0 and said.startswith("4 engines, 0.01 GiB on disk, under 8 names, in outputs, ")
    assert SIZE >= LINKED_BYTES


def test_the_least_recently_used_go_under_every_name_and_what_an_alias_points_to_stays(
    machine: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    limit = str(4 * SIZE / 2**30)
    before = sorted(Path("outputs").rglob("*")) + sorted(Path("engines").rglob("*"))
    code, said, _ = command(capsys, "--limit-gib", limit, "--dry-run")
    assert code == 0 and said.count("would remove: ") == 2
    assert sorted(Path("outputs").rglob("*")) + sorted(Path("engines").rglob("*")) == before
    code, said, _ = command(capsys, "--limit-gib", limit)

    assert code == 0 and said.count("removed: ") == 2 and "kept: 2 engines" in said and "aliases" not in said
    has = {name: (folder / "engine.trt").exists() for name, folder in machine.items()}
    assert has == {
        "run0": True, "tracked0": True, "run1": False, "tracked1": False, "stored1": False, "run2": False,
        "stored2": False, "run3": True,
    }  # fmt: skip
    assert (machine["run1"] / "report.json").exists() and (machine["run1"] / "engine.json").exists()
    assert not machine["stored1"].exists(), "what is left of an entry would be a damaged one"
    assert sum(each.bytes for each in found([Path()])) == 4 * SIZE

    code, said, _ = command(capsys, "--limit-gib", "0")
    assert code == 0 and said.endswith("; the rest is what aliases of the registry point to\n")
    assert (machine["run0"] / "engine.trt").exists() and not (machine["run3"] / "decode.trt").exists()


def test_what_a_run_or_another_process_has_in_hand_stays(
    machine: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (machine["run3"] / STATE).write_text(json.dumps({}))
    with locked(machine["stored2"].with_suffix(".lock")):
        code, _, _ = command(capsys, "--limit-gib", "0")
    assert code == 0
    has = {name: (folder / "engine.trt").exists() for name, folder in machine.items()}
    assert (has["run3"], has["stored2"], has["stored1"], has["run2"]) == (True, True, False, False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit-gib", "-1"], "--limit-gib -1.0: must be at least 0"),
        (["--limit-gib", "nan"], "--limit-gib nan: must be at least 0"),
        (["--limit-gib", "few"], "argument --limit-gib: invalid float value: 'few'"),
        (["--output", "nowhere"], "--output nowhere: there is no such folder"),
        (["--uri", "sqlite:///nowhere.db"], "tracking.uri=sqlite:///nowhere.db: there is no"),
        ([], "--store engines: there is no such folder"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith(f"error: {said}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
