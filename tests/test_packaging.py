"""The wheel: it holds all that the checkout has for a run, and works from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import CONF, save_tiny_llama

ROOT = CONF.parent
SOURCES = ("pipeline", "passes", "conf", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its working files beside the sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(built), str(source)],
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def installed(unpacked: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """``command`` of the unpacked wheel, in a folder from which the checkout cannot be imported."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_wheel_holds_every_module_every_yaml_and_the_prompts(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())

    sources = [path for part in ("pipeline", "passes") for path in (ROOT / part).rglob("*.py")]
    modules = {path.relative_to(ROOT).as_posix() for path in sources}
    settings = {"pipeline/conf/" + path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}
    pages = {f"pipeline/compare/page.{kind}" for kind in ("html", "md", "css", "js")}
    assert len(modules) > 20 and len(settings) > 20
    assert modules | settings | {"pipeline/model/prompts.txt"} | pages <= held
    assert not any(name.startswith(("tests/", "conf/", "build/")) for name in held)


def test_the_installed_package_runs_from_any_folder_with_its_own_conf(unpacked: Path, tmp_path: Path) -> None:
    shown = installed(unpacked, tmp_path, "-m", "pipeline", "--help")
    refused = installed(unpacked, tmp_path, "-m", "pipeline", "strategy=foo")
    composed = installed(unpacked, tmp_path, "-m", "pipeline", "--cfg", "job", "model=qwen3_0_6b")

    assert shown.returncode == 0 and "strategy: decompose, detect_causal" in shown.stdout, shown.stderr
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: strategy=foo: allowed are decompose, detect_causal, lowering, mask_input, upstream\n"
    )
    assert composed.returncode == 0 and "source: Qwen/Qwen3-0.6B" in composed.stdout, composed.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_installed_package_finds_its_data_and_its_strategies(unpacked: Path, tmp_path: Path) -> None:
    script = (
        "import pipeline, passes\n"
        "print(pipeline.__file__, passes.__file__)\n"
        "from pipeline.config.choices import STRATEGIES\n"
        "from passes.graph.strategies import strategy\n"
        "from pipeline.model.text import token_batch\n"
        "from importlib.resources import files\n"
        "print(len([strategy(name) for name in STRATEGIES]))\n"
        "print(len(files('pipeline.model').joinpath('prompts.txt').read_text(encoding='utf-8')) > 5000)\n"
    )

    done = installed(unpacked, tmp_path, "-c", script)

    pipeline, passes, *found = done.stdout.split()
    assert Path(pipeline).is_relative_to(unpacked) and Path(passes).is_relative_to(unpacked)
    assert found == ["5", "True"], done.stderr


def test_in_a_folder_with_a_pipeline_of_its_own_a_sweep_and_its_jobs_are_ours(unpacked: Path, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    theirs = tmp_path / "theirs"
    for name in ("pipeline", "passes"):
        (theirs / name).mkdir(parents=True)
        (theirs / name / "__init__.py").write_text("raise SystemExit('somebody else')")
    script = tmp_path / "bin" / "proved-attention"  # as pip writes it: its own folder is first on its path
    script.parent.mkdir()
    script.write_text("from pipeline.start import main\nif __name__ == '__main__':\n    raise SystemExit(main())\n")
    settings = ["model=local", f"model.path={model}", "shape.max=16", "benchmark=none", "until=load", "seed=1,2"]

    done = installed(unpacked, theirs, str(script), "-m", *settings)

    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(path.read_text()) for path in theirs.glob("outputs/*/*/report.json")]
    assert [report["status"] for report in reports] == ["ok", "ok"]


def test_the_console_script_is_the_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "proved-attention = pipeline.start:main" in archive.read(name).decode()
