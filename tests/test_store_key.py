"""What an engine is stored under: what decides it, and nothing else."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import save_tiny_llama
from imports import imports, room

import passes
import pipeline
from passes.tensorrt.versions import Stack, load_stack
from pipeline.__main__ import compose_config
from pipeline.model.load import LoadedModel, load
from pipeline.record.own_code import BESIDE_A_FIGURE, BESIDE_THE_ENGINE, code_hash
from pipeline.store.key import engine_key, ingredients


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
    ["backend.aux_streams=0"],
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
