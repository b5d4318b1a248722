"""The command that measures what docs/results.md is made of: its sweeps are taken, and its reports have names."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from conftest import CONF
from omegaconf import OmegaConf

from benchmarks import measure
from pipeline.__main__ import _main, compose_config

ROOT = CONF.parent


def reports() -> dict[Path, dict[str, object]]:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def test_reports_that_are_kept_have_the_names_that_the_command_gives() -> None:
    """So a part that is measured again stands in the place of what it was before."""
    newest = {path: report for path, report in reports().items() if report["schema"] >= 2}
    assert len(newest) > 10
    for path, report in newest.items():
        name, again = measure.name_of(report), path.stem.removeprefix(measure.name_of(report))
        assert path.stem.startswith(name) and (not again or (path.parent / f"{name}.json").exists()), path
        assert again in ("", "-2", "-3"), path  # of another process, or another sweep


ELSEWHERE = {"lengths", "batches", "windows", "windows_mistral", "long", "long_gemma"}  # in tests/test_experiments.py


@pytest.mark.parametrize("part", sorted(set(measure.PARTS) - ELSEWHERE))
def test_every_sweep_is_one_that_the_pipeline_takes(part: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = [] if part.startswith(("smollm2", "precisions", "blocks")) else ["model=qwen3_0_6b"]
    for settings in measure.sweeps([part], ["sweep.builders=4", *one]):
        assert _main([*settings, "dry_run=true"]) == 0, capsys.readouterr().err
    assert list(cwd.iterdir()) == []


def test_every_job_of_a_part_is_kept_under_a_name_of_its_own() -> None:
    for part in ("windows", "long", "precisions"):
        names = []
        for settings in measure.PARTS[part]:
            asked = dict(setting.split("=") for setting in settings)
            grid = OmegaConf.load(CONF / "experiment" / f"{asked['experiment']}.yaml").hydra.sweeper.params
            axes = {**grid, **{key: value for key, value in asked.items() if key != "experiment"}}
            for values in product(*(axis.split(",") for axis in axes.values())):
                job = [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
                config = compose_config([f"experiment={asked['experiment']}", *job]).to_dict()
                names.append(measure.name_of({"config": config}))
        assert len(names) == len(set(names)) > 3, part


def test_what_is_over_is_kept_once_under_its_name_and_its_engines_go(tmp_path: Path) -> None:
    over, running, again = (tmp_path / "work" / name for name in ("over", "running", "z_again"))
    report = next(report for report in reports().values() if report["status"] == "ok")
    for folder, status in ((over, "ok"), (running, "failed")):  # a report says failed until something else is true
        folder.mkdir(parents=True)
        (folder / "engine.trt").write_bytes(b"engine")
        (folder / "report.json").write_text(json.dumps({**report, "status": status}))

    assert measure.keep(tmp_path / "work", tmp_path / "kept") == [measure.name_of(report)]
    assert measure.keep(tmp_path / "work", tmp_path / "kept") == [measure.name_of(report)]

    assert [each.name for each in (tmp_path / "kept").iterdir()] == [f"{measure.name_of(report)}.json"]
    assert not (over / "engine.trt").exists() and (running / "engine.trt").exists()

    again.mkdir()  # of another sweep: it takes nothing's place
    (again / "report.json").write_text(json.dumps({**report, "seed": 1}))
    name = measure.name_of(report)
    assert measure.keep(tmp_path / "work", tmp_path / "kept") == [name, f"{name}-2"]
    assert json.loads((tmp_path / "kept" / f"{name}.json").read_text()) == report


def test_a_part_that_is_none_is_refused_and_nothing_is_created(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.measure", str(tmp_path / "to"), "prompt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "prompt: no such part; there are generations, prompts" in done.stderr
    assert not (tmp_path / "to").exists()
