"""The engine store: what an engine's key hangs on, and that an engine is built once, verified and whole, or again."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import environment
from conftest import CONF, save_tiny_llama
from imports import imports, room
from rich.console import Console
from runs import DONE, GPU, artifacts, do, mlflow_run, outcome_in

import passes
import pipeline
from passes.errors import RunError, UserError
from passes.tensorrt.versions import Stack, load_stack, quiet
from pipeline.__main__ import compose_config
from pipeline.config.schema import Config
from pipeline.engine import kernel_cache
from pipeline.engine.runner import open_engine
from pipeline.host.files import LINKED_BYTES, sha256_of, share
from pipeline.model.load import LoadedModel, load
from pipeline.record.console import StageDisplay
from pipeline.record.own_code import BESIDE_A_FIGURE, BESIDE_THE_ENGINE, code_hash
from pipeline.run import Outcome
from pipeline.store import reuse
from pipeline.store.entries import Damaged, Store
from pipeline.store.key import engine_key, ingredients

ROOT = CONF.parent
SMALL = ["shape.max=32", "benchmark=none"]
# A mask that is dropped on the user's word, so that there is a warning to be kept.
ASSUMED = ["model.inputs=[input_ids,attention_mask]", "strategy.assume=[no_padding]"]
BUILD_STAGES = {"export", "strategy", "lower", "interpret", "build"}


# The key


@pytest.fixture(scope="module")
def stack() -> Stack:
    return load_stack()


def tiny_model(**changes: Any) -> LoadedModel:
    return load(tiny.config("llama", **changes), "fp16", tiny.CPU, 0, lambda _: None)


@pytest.fixture(scope="module")
def drawn() -> LoadedModel:
    """Random weights."""
    return tiny_model()


@pytest.fixture(scope="module")
def read(drawn: LoadedModel) -> LoadedModel:
    """Weights of a file."""
    return dataclasses.replace(drawn, sha256="a" * 64)


def key(overrides: list[str], loaded: LoadedModel, stack: Stack) -> str:
    return engine_key(ingredients(compose_config(overrides), loaded, stack, tiny.CPU))


MATTERS = [
    ["precision=bf16"],
    ["precision=int8_weights"],
    ["precision=int8_weights", "quantize.base=bf16"],
    ["precision=int8_weights", "quantize.without=[lm_head]"],
    ["precision=int4_weights"],
    ["precision=int4_weights", "quantize.block=32"],
    ["precision=int4_weights", "quantize.method=gptq"],
    ["precision=int4_weights", "quantize.method=awq"],
    ["precision=int4_weights", "quantize.method=awq", "quantize.calibration.samples=8"],
    ["precision=int8_weights", "cache=in_engine"],
    ["precision=int8_weights", "cache=in_engine", "quantize.prompt=fp16"],
    ["precision=fp8"],
    ["precision=fp8", "quantize.calibration.seed=7"],
    ["precision=fp8", f"quantize.calibration.text={__file__}"],
    ["strategy=lowering"],
    ["strategy.unproven=error"],
    ["strategy.assume=[no_padding]", "model.inputs=[input_ids,attention_mask]"],
    ["strategy.guard=false"],
    ["model.inputs=[input_ids,attention_mask]"],
    ["model.logits=last"],
    ["shape=static"],
    ["shape.batch=2", "benchmark=none"],
    ["shape.max=1024", "benchmark=none"],
    ["shape.opt=1024"],
    ["shape.exact=[]"],
    ["shape.exact=[512,2048]"],
    ["cache=static"],
    ["cache=static", "cache.capacity=4096"],
    ["cache=in_engine", "cache.capacity=4096"],
    ["backend.optimization_level=3"],
    ["backend.workspace_gib=2"],
]
MATTERS_NOT = [
    ["verify.lengths=[7]"],
    ["verify.samples=2"],
    ["benchmark=none"],
    ["benchmark.min_iterations=99"],
    ["tracking.uri=sqlite:///other.db", "tracking.log_engine=false"],
    ["output=elsewhere"],
    ["until=verify"],
    ["backend.cuda_graph=true"],
    ["store.limit_gib=1", "store.folder=elsewhere"],
    ["model.name=mine"],
    ["model.source=me/mine", "model.revision=main"],  # the hash of the weights says which they are
]


def test_the_key_changes_with_what_decides_the_engine(read: LoadedModel, stack: Stack) -> None:
    settings = [[], *MATTERS]
    having: dict[str, list[list[str]]] = {}
    for overrides in settings:
        having.setdefault(key(overrides, read, stack), []).append(overrides)

    assert [same for same in having.values() if len(same) > 1] == []


def test_the_key_stays_with_what_does_not(read: LoadedModel, stack: Stack) -> None:
    plain = key([], read, stack)

    assert [overrides for overrides in MATTERS_NOT if key(overrides, read, stack) != plain] == []


def test_an_open_capacity_counts_the_generation_that_decides_it(read: LoadedModel, stack: Stack) -> None:
    generate = "+benchmark.generate={{batch: 1, input_length: 64, output_length: {}}}".format
    longer, shorter = ([f"cache={name}", generate(n)] for name, n in (("static", 900), ("static", 9)))

    assert key(longer, read, stack) != key(shorter, read, stack)
    chosen = ["cache.capacity=4096"]
    assert key([*longer, *chosen], read, stack) == key([*shorter, *chosen], read, stack)


def test_the_key_changes_with_the_weights_the_model_and_the_versions(
    read: LoadedModel, drawn: LoadedModel, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = key([], read, stack)
    found = {
        same,
        key([], dataclasses.replace(read, sha256="b" * 64), stack),
        # The same weights' file under another config.json.
        key([], dataclasses.replace(tiny_model(rms_norm_eps=1e-3), sha256="a" * 64), stack),
        key([], drawn, stack),
        key(["seed=1"], drawn, stack),
    }
    assert key(["seed=1"], read, stack) == same
    for module, name in ((stack.trt, "__version__"), (stack.torch_tensorrt, "__version__"), (torch, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "0.0.1")
            found.add(key([], read, stack))
    found.add(key([], read, dataclasses.replace(stack, flavour="another")))
    assert len(found) == 9


def test_the_key_does_not_hang_on_where_the_model_lies(tmp_path: Path, stack: Stack) -> None:
    folders = [save_tiny_llama(tmp_path / "here"), save_tiny_llama(tmp_path / "there")]
    keys = set()
    for folder in folders:
        config = compose_config(["model=local", f"model.path={folder}", "shape.max=64", "benchmark=none"])
        loaded = load(config.model, "fp16", tiny.CPU, 0, lambda _: None)
        keys.add(engine_key(ingredients(config, loaded, stack, tiny.CPU)))
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ("passes/proof/masks.py", True),
        ("passes/graph/strategies/lowering.py", True),
        ("pipeline/engine/network.py", True),
        ("pipeline/verify/logits.py", True),
        ("pipeline/model/prompts.txt", True),
        ("pipeline/not_yet_written.py", True),
        ("pipeline/record/console.py", False),
        ("pipeline/measure/prompt.py", False),
    ],
)
def test_the_key_hangs_on_our_own_code_that_can_change_an_engine(changed: str, counts: bool, tmp_path: Path) -> None:
    for package in (passes, pipeline):
        source = Path(package.__file__ or "").parent
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    roots = (tmp_path / "passes", tmp_path / "pipeline")
    assert code_hash(roots) == code_hash()

    with (tmp_path / changed).open("a") as file:
        file.write("# changed\n")

    assert (code_hash(roots) != code_hash()) == counts
    measures = counts or changed.startswith("pipeline/measure")
    assert (code_hash(roots, BESIDE_A_FIGURE) != code_hash(beside=BESIDE_A_FIGURE)) == measures


def test_no_room_that_makes_or_judges_an_engine_is_left_out_of_its_key() -> None:
    """Whatever those rooms import of ``pipeline``, and what that imports; ``host`` is but the machine."""
    rooms: dict[str, set[str]] = {}
    for arrow in imports("pipeline"):
        rooms.setdefault(room(arrow.source), set()).add(room(arrow.target))
    seen: set[str] = set()
    waiting = {"engine", "verify"}
    while waiting:
        seen.add(name := waiting.pop())
        waiting |= rooms.get(name, set()) - seen
    assert seen & BESIDE_THE_ENGINE == {"host"} and {"model", "trace", "engine", "generate"} <= seen


# Entries


def entry(store: Store, name: str, size: int) -> None:
    source = store.root.parent / "engine.trt"
    source.unlink(missing_ok=True)  # an entry may be the same file
    source.write_bytes(bytes(size))
    store.commit(name, [source], {})
    os.utime(store.entry(name) / "stored.json", (len(entries(store)),) * 2)  # one second apart


def entries(store: Store) -> list[str]:
    return sorted(path.name for path in store.root.iterdir() if path.is_dir())


def small_store(tmp_path: Path, limit: int) -> Store:
    root = tmp_path / "engines"
    root.mkdir()
    return Store(root, limit)


def test_above_the_limit_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = small_store(tmp_path, limit=4000)
    for name in "abc":
        entry(store, name, 1000)
    content = store.content("a")
    assert content is not None
    store.restore("a", content["files"], tmp_path)  # used again

    entry(store, "d", 1000)

    assert entries(store) == ["a", "c", "d"]


def test_what_another_process_holds_stays_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    store = small_store(tmp_path, limit=2000)
    entry(store, "held", 1000)
    entry(store, "free", 500)
    (store.root / "killed.partial").mkdir()

    with store.locked("held", print):
        entry(store, "new", 600)

    assert entries(store) == ["held", "new"]


def test_an_engine_above_the_limit_is_not_kept_and_nothing_is_left(tmp_path: Path) -> None:
    store = small_store(tmp_path, limit=100)
    with pytest.raises(OSError, match=r"above store.limit_gib"):
        entry(store, "large", 101)
    assert entries(store) == []


def test_a_second_process_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    store, told, got = small_store(tmp_path, 1000), threading.Event(), threading.Event()

    def second() -> None:
        with store.locked("key", lambda message: told.set()):
            got.set()

    with store.locked("key", print):
        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(10) and not got.is_set()
    thread.join(10)
    assert got.is_set()


@pytest.mark.parametrize("what", ["engine.trt", "stored.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_damaged_entry_is_recognised_and_leaves_nothing_in_the_run_folder(
    what: str, how: str, tmp_path: Path
) -> None:
    store, into = small_store(tmp_path, 2000), tmp_path / "run"
    entry(store, "key", 1000)
    into.mkdir()
    victim = store.entry("key") / what
    content = victim.read_bytes()
    match how:
        case "changed":
            victim.write_bytes(content.replace(content[-9:], b'"":0,' + content[-4:]))
        case "cut":
            victim.write_bytes(content[:-1] if what == "engine.trt" else content[:-3])
        case "missing":
            victim.unlink()

    with pytest.raises(Damaged, match=what):
        stored = store.content("key")
        assert stored is not None
        store.restore("key", stored["files"], into)
    assert list(into.iterdir()) == []


def test_a_large_file_is_shared_and_a_small_one_copied(tmp_path: Path) -> None:
    for size, shared in ((LINKED_BYTES, True), (LINKED_BYTES - 1, False)):
        source, target = tmp_path / f"{size}.trt", tmp_path / f"{size}.too"
        source.write_bytes(b"x" * size)
        for _ in range(2):  # over a name that is there already, too
            share(source, target)
            assert target.samefile(source) == shared and target.read_bytes() == source.read_bytes()
        assert not list(tmp_path.glob("*.part"))
        source.unlink()
        assert target.stat().st_size == size


def test_a_file_is_copied_where_another_file_system_begins(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not os.access(elsewhere, os.W_OK) or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    source = tmp_path / "engine.trt"
    source.write_bytes(os.urandom(LINKED_BYTES))
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        copy = Path(folder) / "engine.trt"
        share(source, copy)
        assert copy.stat().st_dev != source.stat().st_dev and copy.read_bytes() == source.read_bytes()
        assert list(Path(folder).iterdir()) == [copy]


def test_a_run_and_the_store_share_the_engine_and_one_that_was_written_into_is_noticed(tmp_path: Path) -> None:
    store, run, again = small_store(tmp_path, 1e9), tmp_path / "run", tmp_path / "again"
    run.mkdir()
    again.mkdir()
    engine = run / "engine.trt"
    engine.write_bytes(os.urandom(LINKED_BYTES))
    store.commit("key", [engine], {})
    assert (store.entry("key") / "engine.trt").samefile(engine)
    content = store.content("key")
    assert content is not None
    store.restore("key", content["files"], again)
    assert (again / "engine.trt").samefile(engine)

    shutil.rmtree(run)
    store.restore("key", content["files"], again)

    with (again / "engine.trt").open("r+b") as file:  # which nothing of ours does
        file.write(b"other")
    with pytest.raises(Damaged, match=r"engine\.trt was changed"):
        store.restore("key", content["files"], tmp_path)
    assert not (tmp_path / "engine.trt").exists()


# Whole runs


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
