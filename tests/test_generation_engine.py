"""Whole runs that generate through a KV cache: two engines, verified and, on a GPU, timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import save_tiny_llama
from runs import DONE, GPU, do

from passes.errors import UserError
from passes.tensorrt.versions import load_stack
from pipeline.engine.runner import open_engine
from pipeline.engine.session import Session
from pipeline.generate import with_cache
from pipeline.generate.sampling import Sampling
from pipeline.host.plain_json import from_json, to_json
from pipeline.record.sections import Report
from pipeline.run import Outcome
from pipeline.trace import cached_forms
from pipeline.tracking.names import metrics
from pipeline.verify.candidate import open_generator

GENERATE = [
    "benchmark=generate", "shape.max=64", "benchmark.generate.input_length=40", "benchmark.generate.output_length=20",
    "benchmark.min_generations=3", "benchmark.min_seconds=0.1",
]  # fmt: skip
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no NVIDIA GPU that PyTorch can use")]


def generated(store: str, output: Path, model: Path, *overrides: str) -> Outcome:
    return do(store, output / "outputs", model, *GENERATE, *overrides)


def report_of(store: str, output: Path, model: Path, *overrides: str) -> dict[str, Any]:
    return generated(store, output, model, *overrides).report


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "one-layer", num_hidden_layers=1)


@pytest.mark.parametrize("mode", ["in_engine", pytest.param("static", marks=pytest.mark.slow)])
def test_two_engines_are_built_and_what_they_generate_is_judged(
    mode: str, store: str, tmp_path: Path, one_layer: Path
) -> None:
    outcome = generated(store, tmp_path, one_layer, f"cache={mode}")
    report = outcome.report

    assert (report["status"], report["failure"]) == (DONE, None)
    assert set(report["attention"]["summary"]["by_action"]) == {"native_causal"}
    assert set(report["decode"]["attention"]["summary"]["by_action"]) == {"cached"}
    assert report["decode"]["engine"]["file"] == "decode.trt"
    assert report["verify"]["generation"]["passed"] and report["verify"]["generation"]["cases"][0]["tokens"] == 20
    written = json.loads((outcome.folder / "report.json").read_text())
    assert written == report | {"sha256": written["sha256"]} == to_json(from_json(Report, written))
    numbers = metrics(report)
    assert numbers["decode.engine.bytes"] == report["decode"]["engine"]["bytes"] > 0
    assert not any(".calls." in name for name in numbers), "attention calls stay in their table"
    lengths = {case["length"] for case in report["verify"]["cases"]}
    assert {2, 7, 64, 65, 128} <= lengths  # both ends of the profile, and of what only the cache reaches
    kept = {path.name for path in outcome.folder.iterdir()}
    assert {"engine.trt", "engine.json", "decode.trt", "decode.json", "decode_graph_after.txt"} <= kept
    if GPU:
        assert len(open_generator(outcome.folder).generate(tiny.tokens(1, 12), 5)[0]) == 5
    else:
        with pytest.raises(UserError, match="needs an NVIDIA GPU"):
            open_generator(outcome.folder)
        with pytest.raises(UserError, match="open_generator"):
            open_engine(outcome.folder / "decode.trt")


def test_a_folder_without_a_cache_has_no_generator_and_an_engine_of_another_tensorrt_is_refused(
    store: str, tmp_path: Path, one_layer: Path
) -> None:
    outcome = do(store, tmp_path / "out", one_layer, "shape.max=32", "benchmark=none", "until=build")
    with pytest.raises(UserError, match="no KV cache; make one with cache=in_engine"):
        open_generator(outcome.folder)

    manifest_path = outcome.folder / "engine.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["environment"]["tensorrt"] = "9.9.9"
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"engine.trt: was built by \w+ 9.9.9, and this is .*; build it again"):
        open_engine(outcome.folder / "engine.trt")


@pytest.mark.parametrize("mode", [pytest.param("in_engine", marks=needs_gpu), pytest.param("static", marks=needs_gpu)])
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_is_timed_with_its_step_as_a_cuda_graph(
    mode: str, batch: int, store: str, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    inputs = "[input_ids,attention_mask]" if batch > 1 else "[input_ids]"
    overrides = [f"cache={mode}", f"shape.batch={batch}", f"model.inputs={inputs}"]
    report = report_of(store, tmp_path, tiny_llama_dir, *overrides)

    assert (report["status"], report["failure"]) == ("ok", None)
    assert report["benchmark"]["generate"]["cuda_graph"] is True
    assert report["benchmark"]["generate"]["tpot_ms"]["median"] > 0
    memory = report["benchmark"]["memory"]
    assert 0 < memory["context_bytes"] < memory["before_bytes"] and memory["activation_bytes"] > 0
    assert memory["cache_bytes"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("mode", ["in_engine", "static"])
def test_a_prompt_that_is_still_on_its_way_is_waited_for(
    mode: str, store: str, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    """What the caller's stream has yet to write was not waited for, and an engine read the prompt of before."""
    generator = open_generator(generated(store, tmp_path, tiny_llama_dir, f"cache={mode}").folder)
    first, second = (tiny.tokens(1, 12, seed).cuda() for seed in (1, 2))
    expected = [generator.generate(prompt, 8) for prompt in (first, second)]
    logits = [generator.forced_logits(prompt, None, 4) for prompt in (first, second)]
    assert expected[0] != expected[1]

    for prompt, tokens, wanted in zip((first, second) * 2, expected * 2, logits * 2, strict=True):
        late = torch.zeros_like(prompt)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # a tenth of a second of the caller's stream
        late.copy_(prompt)
        assert generator.generate(late, 8) == tokens
        late.zero_()
        torch.cuda._sleep(200_000_000)
        late.copy_(prompt)
        torch.testing.assert_close(generator.forced_logits(late, None, 4), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("mode", ["in_engine", "static"])
def test_generations_of_other_lengths_and_seeds_replay_the_same_graphs(
    mode: str, store: str, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on a CPU, where a graph is simulated: test_captured_steps.py.  An engine that says that it cannot be
    captured replays a graph of its own."""
    folder = generated(store, tmp_path, tiny_llama_dir, f"cache={mode}").folder
    asked = [
        (tiny.tokens(1, length, length), new, sampling)
        for sampling in (Sampling(), Sampling(1.5, 0.9, 1), Sampling(0.7, 0.8, 2))
        for length, new in ((12, 20), (5, 9), (12, 20))
    ]
    alone = [open_generator(folder).generate(prompt, new, sampling=how) for prompt, new, how in asked]
    captures: list[Any] = []
    real = with_cache.captured
    monkeypatch.setattr(with_cache, "captured", lambda *how: captures.append(how) or real(*how))
    made = open_generator(folder)
    assert [made.generate(prompt, new, sampling=how) for prompt, new, how in asked] == alone
    assert made.cuda_graph
    assert len(captures) == (0 if made._replays_itself else 2 * len(made._decode))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("mode", ["in_engine", "static"])
def test_an_engine_that_cannot_be_captured_replays_a_graph_of_its_own(
    mode: str, store: str, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = generated(store, tmp_path, tiny_llama_dir, f"cache={mode}").folder
    prompt = tiny.tokens(1, 12)
    captured = open_generator(folder)
    expected = captured.generate(prompt, 20)
    monkeypatch.setattr(Session, "capturable", lambda *_: False)

    generator = open_generator(folder)

    assert [generator.generate(prompt, 20) for _ in range(2)] == [expected] * 2
    assert generator.cuda_graph is load_stack().replays_itself and captured.cuda_graph


@pytest.mark.parametrize("row", [pytest.param("none", marks=needs_gpu)])
def test_without_a_cache_the_prefix_runs_again_for_every_token(
    row: str, store: str, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    report = report_of(store, tmp_path, tiny_llama_dir, f"cache={row}")

    assert (report["status"], report["failure"]) == ("ok", None)
    assert report["benchmark"]["generate"]["cuda_graph"] is False


@pytest.mark.parametrize("strategy", ["upstream", "mask_input"])
def test_a_strategy_that_cannot_have_a_cache_is_refused(
    strategy: str, store: str, tmp_path: Path, tiny_llama_dir: Path
) -> None:

    with pytest.raises(
        UserError, match=rf"cache=in_engine\)={strategy}: allowed are detect_causal, lowering, decompose"
    ):
        do(store, tmp_path / "out", tiny_llama_dir, "cache=in_engine", f"strategy={strategy}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["detect_causal", pytest.param("decompose", marks=pytest.mark.slow)])
def test_a_batch_over_a_cache_is_verified_and_generates_with_rows_of_different_lengths(
    strategy: str, store: str, tmp_path: Path, one_layer: Path
) -> None:
    """The mask of the first row stood for all of them, and no case with ``input_ids`` alone had two lengths."""
    batch = ["shape.batch=3", "benchmark.generate.batch=3", "cache=in_engine", f"strategy={strategy}", "shape.exact=[]"]
    report = report_of(store, tmp_path, one_layer, *batch, "benchmark.shapes=[]")

    assert (report["status"], report["failure"]) == (DONE, None)
    ragged = [case for case in report["verify"]["cases"] if case["padding"] == "ragged"]
    assert {7, 64, 65, 128} <= {case["length"] for case in ragged} and all(case["passed"] for case in ragged)
    assert all(case["positions_judged"] == 3 for case in ragged), "the last of each row"
    names = [case["name"] for case in report["verify"]["generation"]["cases"]]
    assert names == ["generation_40_20", "generation_40_20_ragged"]


def test_rows_that_get_each_others_places_fail_the_verification(
    store: str, tmp_path: Path, one_layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = cached_forms._mask_of_rows

    def of_the_first_row(position: torch.Tensor, *rings: Any, **how: Any) -> torch.Tensor | None:
        return honest(position[:1].expand_as(position), *rings, **how)

    monkeypatch.setattr(cached_forms, "_mask_of_rows", of_the_first_row)
    monkeypatch.setattr(cached_forms, "reads_first_row", lambda program: False)
    batch = ["shape.batch=3", "benchmark.generate.batch=3", "cache=in_engine", "strategy=decompose", "shape.exact=[]"]
    report = report_of(store, tmp_path, one_layer, *batch, "benchmark.shapes=[]")

    assert (report["failure"]["stage"], report["failure"]["kind"]) == ("verify", "accuracy")
    assert {case["padding"] for case in report["verify"]["cases"] if not case["passed"]} == {"ragged"}


@pytest.mark.slow
def test_decomposed_attention_generates_too(store: str, tmp_path: Path, tiny_llama_dir: Path) -> None:
    report = report_of(store, tmp_path, tiny_llama_dir, "cache=in_engine", "strategy=decompose")

    assert (report["status"], report["failure"]) == (DONE, None)
    assert set(report["decode"]["attention"]["summary"]["by_action"]) == {"decomposed"}
