"""Generation in whole runs: what is judged, what a row that cannot run leaves, and the table as one experiment."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CONF, save_tiny_llama
from omegaconf import OmegaConf
from runs import GPU, do, failure, mlflow_run
from simulated import Measured
from torch import Tensor

from passes.errors import RunError, UserError
from pipeline.__main__ import compose_config
from pipeline.config.schema import BackendConfig, Config
from pipeline.generate.protocol import Generator
from pipeline.measure.attention_kernels import UNKNOWN, attention_kernels
from pipeline.measure.generation import measure_generation
from pipeline.model.load import LoadedModel, load
from pipeline.model.text import tokens_for
from pipeline.rivals import plugin
from pipeline.rivals.generation import rival_generator
from pipeline.trace.call_form import CallForm
from pipeline.verify import stage
from pipeline.verify.candidate import Machine
from pipeline.verify.sections import Verification

EXPERIMENT = OmegaConf.load(CONF / "experiment" / "issue_4129.yaml")
SWEPT = {key: value.split(",") for key, value in EXPERIMENT.hydra.sweeper.params.items()}
SHORT = ["benchmark=generate", "shape.max=16", "benchmark.generate.input_length=12"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


# The table


@pytest.mark.parametrize("row", SWEPT["row"])
def test_every_row_of_the_table_composes_to_the_reports_generation(row: str) -> None:
    for model in SWEPT["model"]:
        config = compose_config(["experiment=issue_4129", f"model={model}", f"row={row}"])

        assert config.benchmark.generate is not None
        shape = (config.benchmark.generate.input_length, config.benchmark.generate.output_length)
        assert (config.model.name, config.model.weights, config.precision, shape) == (
            model,
            "random",
            "fp16",
            (2048, 128),
        )
        assert config.shape.max == (2176 if row == "proved" else 2175 if config.cache.name == "none" else 2048)
        assert config.runs_at_one_length == (row == "proved")
        assert row.endswith(config.cache.name) or row in ("eager", "compile", "upstream", "proved", "plugin")


def test_the_table_has_every_row_once() -> None:
    assert sorted(SWEPT["row"]) == sorted(path.stem for path in (CONF / "row").glob("*.yaml"))
    rows = [compose_config(["experiment=issue_4129", f"row={row}"]) for row in SWEPT["row"]]
    chosen = [(c.backend.name, c.cache.name, c.strategy.name) for c in rows]
    assert len(set(chosen)) == len(chosen)
    for one, other in itertools.combinations(rows, 2):
        assert one.to_dict() != other.to_dict()


# A row that cannot run here


def test_a_row_that_cannot_run_here_is_unavailable_with_its_reason(store: str, tiny: Path, tmp_path: Path) -> None:
    outcome = do(store, tmp_path, tiny, "backend=plugin", "cache=in_engine", *SHORT)

    assert (outcome.report["status"], outcome.report["failure"]) == ("unavailable", None)
    assert "add_plugin" in outcome.report["unavailable"]
    assert outcome.report["benchmark"] is None and outcome.report["verify"] is None
    kept = mlflow_run(store, outcome)
    assert kept.info.status == "FINISHED"
    assert kept.data.tags["status"] == "unavailable" and "add_plugin" in kept.data.tags["unavailable"]


def test_a_plugin_that_perhaps_could_run_is_not_claimed_to() -> None:
    full = SimpleNamespace(flavour="tensorrt")

    assert "plugin_library=null" in plugin.why_not(BackendConfig("plugin"), full)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="nothing here ever drove this plugin") as caught:
        plugin.why_not(BackendConfig("plugin", plugin_library="libplugin.so"), full)  # type: ignore[arg-type]
    assert caught.value.kind == "untested"


def test_a_plugin_library_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"backend.plugin_library=none.so: no such file"):
        compose_config(["backend=plugin", "backend.plugin_library=none.so"])


# Judging in a run


@pytest.fixture
def config(tiny: Path) -> Config:
    settings = ["backend=eager", "cache=static", "precision=bf16", "benchmark.generate.output_length=4", *SHORT]
    return compose_config(["model=local", f"model.path={tiny}", *settings])


def made_for(config: Config) -> tuple[LoadedModel, Generator]:
    loaded = load(config.model, config.precision, torch.device("cpu"), 0, lambda _: None)
    return loaded, rival_generator(loaded.model, config.backend, config.cache)


def steps(config: Config, loaded: LoadedModel, generator: Generator) -> Iterator[Verification]:
    """The verification of PyTorch itself, and of what ``generator`` generates."""
    form = CallForm(loaded.model, config.model.logits)
    what = Machine("eager", lambda inputs: form(**inputs), config.shape, generator=generator)
    return stage.verify(
        what, loaded, config.model, config.verify, precision=config.precision, seed=0, flavour=None,
        generate=config.benchmark.generate, assumed=(), progress=lambda *step: None,
    )  # fmt: skip


def prompts(config: Config, loaded: LoadedModel) -> Tensor:
    shape = config.benchmark.generate
    assert shape is not None
    return tokens_for(loaded, shape.batch, shape.input_length, config.seed)


def test_the_generation_that_will_be_timed_is_judged_token_by_token(config: Config) -> None:
    loaded, generator = made_for(config)
    before, found = steps(config, loaded, generator)

    assert all(case.passed for case in before.cases) and not before.passed, "not before the tokens are judged too"
    stage.gate(before)
    assert found.generation is not None and found.generation.passed and found.passed
    assert [(case.name, case.tokens) for case in found.generation.cases] == [("generation_12_4", 4)]
    bound = generator.generation
    generator.prepare(prompts(config, loaded), 4)
    assert generator.generation == bound, "nothing is compiled again between judging and timing"


def test_a_generation_with_a_wrong_token_ends_the_run_and_its_verification_failed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, generator = made_for(config)
    honest = generator.tokens

    def wrong() -> Tensor:
        return (honest() + torch.tensor([[0, 0, 1, 0]])) % 128

    monkeypatch.setattr(generator, "tokens", wrong)
    _, found = steps(config, loaded, generator)
    with pytest.raises(RunError) as caught:
        stage.gate(found)
    assert caught.value.kind == "accuracy"
    assert found.passed is False
    assert found.generation is not None and found.generation.cases[0].first_difference == 2


@pytest.mark.skipif(GPU, reason="is about machines without a GPU")
def test_a_rival_that_generates_is_not_executed_without_a_gpu(store: str, tiny: Path, tmp_path: Path) -> None:
    outcome = do(store, tmp_path, tiny, "backend=eager", "cache=dynamic", "benchmark.generate.output_length=4", *SHORT)

    assert outcome.report["status"] == "not_executed" and outcome.report["benchmark"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize(
    ("backend", "cache"), [("eager", "none"), ("eager", "dynamic"), ("eager", "static"), ("torch_compile", "static")]
)
def test_a_rival_is_judged_and_timed_as_a_generator(
    backend: str, cache: str, store: str, tiny: Path, tmp_path: Path
) -> None:
    settings = ["benchmark.generate.output_length=8", "shape.max=32", "benchmark.min_seconds=0.1"]
    settings += ["backend.mode=reduce-overhead", "verify.lengths=[16]"] if backend == "torch_compile" else []
    outcome = do(store, tmp_path, tiny, f"backend={backend}", f"cache={cache}", *SHORT, *settings)

    assert outcome.report["status"] == "ok", failure(outcome)
    benchmark = outcome.report["benchmark"]
    assert benchmark["generate"]["cuda_graph"] == (backend == "torch_compile")
    samples = json.loads((outcome.folder / "samples.json").read_text())["generate"]
    for whole, first, step, host in zip(
        *(samples[f"{name}_ms"] for name in ("device", "ttft", "tpot", "host")), strict=True
    ):
        assert whole == pytest.approx(first + 7 * step)
        assert host > 0.99 * whole, "the host's clock runs from before the first pass until behind the last"
    assert outcome.report["verify"]["generation"]["passed"]


def test_a_generation_beyond_the_models_positions_is_refused(store: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with the prompt 262 tokens, above max_position_embeddings=256"):
        do(store, tmp_path, tiny, "backend=eager", "cache=dynamic", "benchmark.generate.output_length=250", *SHORT)


class HostEvent:
    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


class HostClock:
    """The clock of a device that has always finished: the CPU, which runs what is launched at once."""

    now_ns = staticmethod(time.perf_counter_ns)
    event = HostEvent
    on_stream = nullcontext

    def synchronize(self) -> None: ...


def test_a_real_generator_is_timed_counted_and_its_kernels_named(config: Config) -> None:
    loaded, generator = made_for(config)
    asked = replace(config.benchmark, min_seconds=0.0, warmup_seconds=0.1)
    report = Measured(measure_generation(generator, asked, prompts(config, loaded), True, clock=HostClock())).report

    whole, decode = report["generate"], report["decode"]
    assert whole["device_ms"]["n"] == asked.min_generations and decode["device_ms"]["n"] == 3 * asked.min_generations
    assert 0 < whole["ttft_ms"]["median"] < whole["device_ms"]["median"] <= 1.01 * whole["host_ms"]["median"]
    assert all("scaled_dot_product" in name for names in report["kernels"].values() for name in names)
    assert generator.tokens().shape == (1, 2), "the last thing was the profile of a prefill and one step"


# Kernels


def test_attention_is_told_by_the_name_of_what_ran() -> None:
    q = torch.zeros(1, 2, 4, 8)

    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in attention_kernels(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)
    )
    assert attention_kernels(lambda: q + q) == [UNKNOWN]
