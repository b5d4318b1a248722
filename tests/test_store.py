"""Runs that take their engine from the store: it is built once, verified and whole, or built again."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import environment
from conftest import save_tiny_llama
from rich.console import Console
from runs import DONE, GPU, artifacts, do, mlflow_run, outcome_in

from passes.errors import RunError, UserError
from passes.tensorrt.versions import Stack, load_stack, quiet
from pipeline.__main__ import compose_config
from pipeline.config.schema import Config
from pipeline.engine import kernel_cache
from pipeline.engine.runner import open_engine
from pipeline.host.files import sha256_of
from pipeline.model.load import load
from pipeline.record.console import StageDisplay
from pipeline.run import Outcome
from pipeline.store import reuse
from pipeline.store.entries import Store
from pipeline.store.key import ingredients

SMALL = ["shape.max=32", "benchmark=none"]
# A mask that is dropped on the user's word, so that there is a warning to be kept.
ASSUMED = ["model.inputs=[input_ids,attention_mask]", "strategy.assume=[no_padding]"]
BUILD_STAGES = {"export", "strategy", "lower", "interpret", "build"}


@pytest.fixture(scope="module")
def stack() -> Stack:
    return load_stack()


class Shown(StageDisplay):
    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(Console(file=self.text, width=200))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", num_hidden_layers=1)


@dataclasses.dataclass
class Twice:
    """The same run, twice."""

    engines: Path
    miss: Outcome
    hit: Outcome
    shown: str


@pytest.fixture(scope="module")
def twice(store: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Twice:
    engines, output, display = tmp_path_factory.mktemp("engines"), tmp_path_factory.mktemp("runs"), Shown()
    kept = [*SMALL, *ASSUMED, "store.enabled=true", f"store.folder={engines}"]
    miss = do(store, output, model, *kept)
    return Twice(engines, miss, do(store, output, model, *kept, display=display), display.text.getvalue())


def test_the_second_run_builds_nothing_and_says_so(twice: Twice) -> None:
    miss, hit = twice.miss.report, twice.hit.report

    assert (miss["status"], hit["status"]) == (DONE, DONE)
    assert set(miss["stages_s"]) >= BUILD_STAGES and not set(hit["stages_s"]) & BUILD_STAGES
    nothing = {"hit": False, "stages": dict.fromkeys(BUILD_STAGES, "miss"), "built": None, "stages_s": {}}
    assert miss["store"] == {"key": hit["store"]["key"], **nothing}
    assert hit["store"]["hit"] and set(hit["store"]["stages"].values()) == {"hit"}
    assert set(hit["store"]["stages"]) == BUILD_STAGES | (set() if GPU else {"verify"})
    assert hit["store"]["stages_s"] == {stage: miss["stages_s"][stage] for stage in hit["store"]["stages"]}
    assert f"hit {hit['store']['key'][:12]}" in twice.shown and "spared" in twice.shown


def test_the_report_of_a_hit_has_what_that_of_the_build_had(twice: Twice) -> None:
    miss, hit = (json.loads((run.folder / "report.json").read_text()) for run in (twice.miss, twice.hit))

    for section in ("environment", "model", "attention", "engine", "notes"):
        assert hit[section] == miss[section], section
    assert any("on your word that no_padding" in note for note in hit["notes"])
    if not GPU:  # else the engine is judged again
        assert hit["verify"] == {**miss["verify"], "stored": True}
        assert miss["verify"]["executed"] == "graph" and miss["verify"]["outside"]


def test_the_run_folder_and_mlflow_of_a_hit_hold_the_same_files(twice: Twice, store: str) -> None:
    files = {"engine.trt", "engine.json", "graph_before.txt", "graph_after.txt", "attention_calls.md"}
    for name in files:
        assert (twice.hit.folder / name).read_bytes() == (twice.miss.folder / name).read_bytes(), name
    (stored,) = twice.engines.glob("*/engine.trt")
    assert all(stored.samefile(run.folder / "engine.trt") for run in (twice.miss, twice.hit))
    for outcome in (twice.miss, twice.hit):
        kept = mlflow_run(store, outcome)
        assert artifacts(store, kept.info.run_id) >= files | {"report.json"}
        assert kept.data.tags["engine.verified"] == ("engine" if GPU else "graph")
    assert mlflow_run(store, twice.hit).data.metrics["store.hit"] == 1


def config_of(outcome: Outcome, **changes: Any) -> Config:
    config = compose_config(["model=local", f"model.path={outcome.report['config']['model']['path']}"])
    strategy = dataclasses.replace(config.strategy, assume=["no_padding"])
    named = dataclasses.replace(config.model, inputs=["input_ids", "attention_mask"])
    shape = dataclasses.replace(config.shape, opt=32, max=32, exact=[32])
    engines = dataclasses.replace(config.store, folder=outcome.report["config"]["store"]["folder"])
    settings = {"strategy": strategy, "model": named, "shape": shape, "store": engines}
    return dataclasses.replace(config, **settings | changes)


def place_of(config: Config, folder: Path) -> Any:
    """The context manager around the place of that run's engine."""
    device = torch.device("cuda" if GPU else "cpu")
    folder.mkdir()
    loaded = load(config.model, config.precision, device, config.seed, lambda _: None)
    decided_by = ingredients(config, loaded, load_stack(), device)
    wanted = reuse.judged_as(config.verify, config.seed) if config.reaches("verify") else None
    return reuse.engine_of(folder, Store.of(config.store), decided_by, wanted, print, print)


@pytest.mark.skipif(GPU, reason="with a GPU the engine is judged again")
def test_a_verification_that_was_made_on_other_inputs_is_not_taken_over(twice: Twice, tmp_path: Path) -> None:
    config = config_of(twice.miss)
    longer = dataclasses.replace(config.verify, lengths=[31])

    for number, (changes, restored) in enumerate(
        [({}, True), ({"verify": longer}, False), ({"seed": 1}, False), ({"verify": longer, "until": "build"}, True)]
    ):
        with place_of(dataclasses.replace(config, **changes), tmp_path / str(number)) as place:
            assert (place.kept is not None) == restored, changes


def test_a_stored_engine_that_fails_its_verification_is_removed(twice: Twice, tmp_path: Path) -> None:
    engines = tmp_path / "engines"
    shutil.copytree(twice.engines, engines)
    config = config_of(twice.miss)
    config.store.folder = str(engines)

    with pytest.raises(RunError), place_of(config, tmp_path / "run") as place:
        assert place.kept is not None
        raise RunError("accuracy", "1 of 1 cases failed")

    assert [path.name for path in engines.iterdir() if path.is_dir()] == []


def test_a_damaged_engine_is_removed_built_again_and_kept(
    twice: Twice, store: str, model: Path, tmp_path: Path
) -> None:
    engines = tmp_path / "engines"
    shutil.copytree(twice.engines, engines)
    (stored,) = engines.glob("*/engine.trt")
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    asked = [*SMALL, *ASSUMED, "store.enabled=true", f"store.folder={engines}"]

    report = do(store, tmp_path / "runs", model, *asked).report

    assert report["status"] == DONE and not report["store"]["hit"] and "build" in report["stages_s"]
    (note,) = (note for note in report["notes"] if note.startswith("store: "))
    assert "engine.trt was changed" in note
    kept = Store(engines, 1e9).content(report["store"]["key"])
    assert kept is not None and kept["files"]["engine.trt"] == sha256_of(stored) == report["engine"]["sha256"]
    assert "store: " not in "".join(kept["engines"]["notes"])


def test_a_run_that_ends_before_the_engine_leaves_the_store_alone(store: str, model: Path, tmp_path: Path) -> None:
    engines = tmp_path / "engines"

    report = do(
        store, tmp_path, model, *SMALL, "until=strategy", "store.enabled=true", f"store.folder={engines}"
    ).report

    assert report["status"] == "ok" and report["store"] is None and not engines.exists()


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_created(
    store: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^store\.folder=.*/file/engines: cannot be written"):
        do(store, tmp_path / "runs", model, *SMALL, "store.enabled=true", f"store.folder={tmp_path}/file/engines")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("store.limit_gib=0", r"store\.limit_gib=0\.0: must be above 0"),
        ("store.folder=''", r"store\.folder=: name a folder"),
        ("store.enabled=maybe", r"store\.enabled=maybe: must be true or false"),
    ],
)
def test_settings_of_the_store_that_will_not_do_are_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose_config([override])


def test_a_run_waits_for_the_process_that_builds_its_engine_and_then_takes_it(
    twice: Twice, store: str, tmp_path: Path
) -> None:
    built, key = Store(twice.engines, 1e9), twice.miss.report["store"]["key"]
    shared = Store(tmp_path / "engines", 1e9)
    model = twice.miss.report["config"]["model"]["path"]
    settings = ["model=local", f"model.path={model}", *ASSUMED, *SMALL, f"store.folder={shared.root}", "until=build"]
    shared.root.mkdir()

    with shared.locked(key, print):  # this process is the one that builds
        second = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *settings, f"tracking.uri={store}", f"output={tmp_path}/runs"],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        assert any("waiting for another process" in line for line in second.stderr)
        shutil.copytree(built.entry(key), shared.entry(key))
    _, shown = second.communicate(timeout=100)

    assert second.returncode == 0, shown
    report = outcome_in(tmp_path / "runs").report
    assert report["store"]["hit"] and "build" not in report["stages_s"]


# What TensorRT keeps


def test_a_timing_cache_is_written_after_a_build_and_read_before_the_next(stack: Stack, tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    with quiet():  # TensorRT-RTX, which measures nothing, says that it is deprecated there
        builder = stack.trt.Builder(stack.torch_tensorrt.logging.TRT_LOGGER)
        for _ in range(2):
            config = builder.create_builder_config()
            with kernel_cache.measured(config, path):
                assert config.get_timing_cache() is not None
            assert path.stat().st_size > 0
    assert list(tmp_path.iterdir()) == [path]


def test_kernels_are_not_written_for_an_engine_that_has_left_the_store(stack: Stack, tmp_path: Path) -> None:
    with quiet():
        builder = stack.trt.Builder(stack.torch_tensorrt.logging.TRT_LOGGER)
        cache = builder.create_builder_config().create_timing_cache(b"")
        kernel_cache.save(cache, tmp_path / "gone" / "runtime.cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU that TensorRT can run on")
def test_compiled_kernels_are_kept_and_an_engine_that_loads_them_gives_the_same_logits(
    twice: Twice, stack: Stack, tmp_path: Path
) -> None:
    if stack.flavour != "tensorrt_rtx":
        pytest.skip("only TensorRT-RTX compiles kernels when they are first needed")
    kept = twice.engines / twice.miss.report["store"]["key"] / "runtime.cache"
    tokens = tiny.tokens(1, 32).cuda()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    logits = []
    for cache in (tmp_path / "empty.cache", kept):
        engine = open_engine(twice.miss.folder / "engine.trt", runtime_cache=cache)
        logits.append(engine(inputs))

    assert kept.stat().st_size > 0
    assert torch.equal(*logits)
