"""What a precision costs: perplexity, KL and greedy texts beside the unquantised model, on real text, and its gate."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from dataclasses import replace
from math import isnan, log, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_LLAMA, model_config
from runs import DONE, GPU, SMALL, do, failure
from test_deploy import characters
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from passes.errors import RunError, UserError
from pipeline.__main__ import _main, compose_config
from pipeline.config.quantize import CalibrationConfig
from pipeline.config.schema import CacheConfig, ModelConfig, ShapeConfig, StrategyConfig
from pipeline.config.verification import VerifyConfig
from pipeline.engine import programs
from pipeline.model import real_text as texts
from pipeline.model.calibration import samples
from pipeline.model.load import LoadedModel, load
from pipeline.model.real_text import LETTERS, RealText, real_text
from pipeline.record.console import described
from pipeline.run import run
from pipeline.verify import candidate, quality
from pipeline.verify.candidate import Machine, Wanted
from pipeline.verify.scored import Scored, scored
from pipeline.verify.sections import PrecisionCost, Quality

CPU = torch.device("cpu")
STRATEGY = StrategyConfig("lowering", "keep", guard=False)
STEPS = 250


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama that knows the text that it is measured on by heart, so that it has something to lose,
    and a tokenizer of a byte a token."""
    folder = tmp_path_factory.mktemp("quality") / "taught"
    tokenizer = characters(None)
    tokenizer.save_pretrained(folder)
    text = torch.tensor(tokenizer(texts._docstrings()[:4000]).input_ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA | {"vocab_size": 256, "intermediate_size": 192}))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(STEPS):
            at = torch.randint(2060, (8, 1)) + torch.arange(65)
            loss = cross_entropy(model(input_ids=text[at[:, :-1]]).logits.flatten(0, 1), text[at[:, 1:]].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 1.5, loss  # from log(256) = 5.5
    model.save_pretrained(folder)
    return folder


def form_of(folder: Path, logits: str = "all") -> ModelConfig:
    return model_config("local", path=str(folder), logits=logits)


@pytest.fixture(scope="module")
def loaded(taught: Path) -> LoadedModel:
    return load(form_of(taught), "fp32", CPU, 0, lambda _: None)


@pytest.fixture(scope="module")
def text(loaded: LoadedModel) -> RealText:
    return real_text(None, loaded, 2001)


def eager(
    model: Any, window: int, places: int, batch: int = 1, change: Callable[[Tensor], Tensor] = lambda x: x
) -> Scored:
    """``model`` as what is executed, its logits changed."""

    def logits(tokens: Tensor) -> Tensor:
        made: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=places).logits
        return change(made)

    return Scored("engine", logits, batch, window, places)


def cost(what: Scored, loaded: LoadedModel, text: RealText) -> PrecisionCost:
    return quality.cost_of(what, loaded.model, text, lambda *_: None)


# ---- the text


def test_the_text_that_every_machine_has_is_the_docstrings_of_the_standard_library(
    loaded: LoadedModel, text: RealText
) -> None:
    assert loaded.tokenizer is not None
    whole = loaded.tokenizer.decode(text.tokens)

    first = ast.get_docstring(ast.parse(Path(ast.__file__).with_name("abc.py").read_bytes()))
    assert first is not None and first in whole and text.source == texts.DOCSTRINGS
    assert text.sha256 == hashlib.sha256(whole.encode()).hexdigest()
    assert len(text.tokens) > 200_000 and text.begin is None  # a byte a token; the GPU's 20 000 and more


def test_a_file_of_the_users_is_read_as_it_is(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Grüße. " * 400, encoding="utf-8")

    found = real_text(str(tmp_path / "own.txt"), loaded, 2001)

    assert found.source == str(tmp_path / "own.txt") and len(found.tokens) == 400 * len("Grüße. ".encode())


def test_samples_for_calibration_are_pieces_of_the_text_that_is_not_judged(loaded: LoadedModel, text: RealText) -> None:
    assert loaded.tokenizer is not None
    found = samples(loaded, CalibrationConfig(samples=20, length=256), 0)
    read = (text, real_text(None, loaded, 1, behind=LETTERS))
    judged, behind = (loaded.tokenizer.decode(each.tokens) for each in read)

    pieces = [loaded.tokenizer.decode(each) for each in found]
    assert found.shape == (20, 256) and len(set(pieces)) == 20
    assert all(piece in behind and piece not in judged for piece in pieces)


@pytest.mark.parametrize(
    ("places", "batch", "begin"), [(16, 1, None), (16, 2, 7), (5, 3, None), (1, 1, 7), (1, 2, None)]
)
def test_each_token_is_predicted_once_in_order_from_those_before_it(places: int, batch: int, begin: int | None) -> None:
    numbers = torch.arange(1000, 3000)
    what = Scored("graph", lambda tokens: tokens, batch, 16, places)

    pieces, targets = quality.rows(RealText("", "", numbers, begin), what, 100)

    assert pieces.shape[1] == 16 and targets.shape == (len(pieces), places) and len(pieces) % batch == 0
    predicted = targets.flatten()
    assert len(predicted) >= 100 and (predicted.diff() == 1).all()
    assert (targets[:, -1] == pieces[:, -1] + 1).all()
    if begin is None:
        assert (pieces.diff(dim=1) == 1).all()
    else:
        assert (pieces[:, 0] == begin).all() and (pieces[:, 1:].diff(dim=1) == 1).all()


def test_a_text_that_is_over_starts_again() -> None:
    what = Scored("graph", lambda tokens: tokens, 1, 8, 8)

    _, targets = quality.rows(RealText("", "", torch.arange(20), None), what, 24)

    assert targets.flatten().tolist() == [*range(1, 20), 0, 1, 2, 3, 4]


# ---- what is measured


def test_perplexity_is_that_of_transformers_own_loss(loaded: LoadedModel, text: RealText) -> None:
    found = cost(eager(loaded.model, 64, 64), loaded, text)

    pieces = text.tokens[: 32 * 64 + 1]
    logits = loaded.model(input_ids=pieces[:-1].view(32, 64)).logits
    wanted = float(cross_entropy(logits.flatten(0, 1), pieces[1:]))
    assert found.tokens == 2048 and found.context == 64
    assert log(found.perplexity.value) == pytest.approx(wanted, rel=1e-5)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high
    assert found.perplexity == found.reference_perplexity
    assert found.increase.value == found.increase.low == found.increase.high == 0
    assert found.kl == 0 and found.top1_agreement == 1 and found.greedy.parted == 0
    assert found.greedy.first_token is None and found.greedy.agreed_tokens == found.greedy.tokens


def test_flatter_logits_cost_what_they_cost_and_the_rise_is_surer_than_either_perplexity(
    loaded: LoadedModel, text: RealText
) -> None:
    found = cost(eager(loaded.model, 64, 64, change=lambda logits: 0.8 * logits), loaded, text)

    logits = loaded.model(input_ids=text.tokens[:2048].view(32, 64)).logits.flatten(0, 1)
    p, q = logits.log_softmax(-1), (0.8 * logits).log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.increase.value == pytest.approx(found.perplexity.value / found.reference_perplexity.value - 1)
    assert found.increase.low < found.increase.value < found.increase.high
    width = found.increase.high - found.increase.low
    assert width < (found.perplexity.high - found.perplexity.low) / found.reference_perplexity.value
    assert found.top1_agreement == 1 and found.greedy.parted == 0  # the most likely stays so


def test_the_interval_holds_the_mean_of_another_draw_as_often_as_it_says() -> None:
    """Numbers that hang together over some ten neighbours, as those of a text do: an interval that took them for
    independent would hold the truth in half of the draws."""
    generator, held = torch.Generator().manual_seed(0), 0
    kernel = torch.ones(1, 1, 10) / 10
    for _ in range(200):
        noise = torch.randn(1, 1, 2059, generator=generator)
        found = quality._estimate(torch.nn.functional.conv1d(noise, kernel)[0, 0].double())
        held += found.low <= 1.0 <= found.high  # exp(0)
    assert 180 <= held <= 198


@pytest.mark.parametrize("places", [64, 20, 1])
def test_greedy_texts_part_where_another_token_becomes_the_most_likely(
    places: int, loaded: LoadedModel, text: RealText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is executed forbids the token that the reference writes most often: its own greedy text, written out token
    by token, parts there."""
    monkeypatch.setitem(quality.TOKENS, "cpu", 100)
    wide = loaded.model
    new = min(quality.NEW_TOKENS["cpu"], places) if places > 1 else quality.NEW_TOKENS["cpu"] // 4
    start = text.tokens[: 64 - (new - 1) * (places > 1)].unsqueeze(0)

    def written(change: Callable[[Tensor], Tensor]) -> list[int]:
        tokens = start
        for _ in range(new):
            tokens = torch.cat([tokens, change(wide(input_ids=tokens[:, -64:]).logits[:, -1:]).argmax(-1)], dim=1)
        return tokens[0, -new:].tolist()

    theirs = written(lambda logits: logits)
    banned = theirs[len(theirs) // 2]

    def without(logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([banned]), -1e4)

    ours = written(without)
    wanted = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    found = cost(eager(wide, 64, places, change=without), loaded, text).greedy
    assert (found.texts, found.tokens, found.parted) == (1, new, 1)
    assert found.first_token == found.agreed_tokens == wanted


def test_a_model_that_is_not_finite_is_told_from_an_engine_that_is_not(loaded: LoadedModel, text: RealText) -> None:
    broken = cost(eager(loaded.model, 64, 64, change=lambda logits: logits * nan), loaded, text)
    assert isnan(broken.increase.value)
    with pytest.raises(RunError) as raised:
        quality.gate(Quality(None, broken, None, quality._passed(broken, None)))
    assert raised.value.kind == "quality"

    model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA | {"vocab_size": 256})).requires_grad_(False)
    model.lm_head.weight.fill_(nan)
    with pytest.raises(RunError) as raised:
        quality.cost_of(eager(loaded.model, 64, 64), model, text, lambda *_: None)
    assert raised.value.kind == "model"


# ---- what is executed, in each of its forms


def machines(loaded: LoadedModel, form: ModelConfig, shape: ShapeConfig, cache: str) -> Machine:
    """The graphs of a run on a machine without a GPU."""
    config = CacheConfig(cache, 128 if cache != "none" else None)
    held = programs.cache_of(loaded.model, config, shape, None)
    parts = programs.parts(loaded.model, form, shape, held)
    made = {name: programs.rewritten(trace(), STRATEGY) for name, trace in parts.items()}
    return candidate.graphs(made, loaded, Wanted(shape, held, False, False), "fp32")


@pytest.mark.parametrize("cache", ["none", "in_engine", pytest.param("static", marks=pytest.mark.slow)])
def test_a_pass_for_each_token_and_a_step_for_each_token_find_what_one_pass_over_all_finds(
    cache: str, taught: Path, loaded: LoadedModel, text: RealText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine is asked in the form in which it answers; the graphs stand in for engines here."""
    monkeypatch.setitem(quality.TOKENS, "cpu", 100)
    form, shape = form_of(taught, "last"), ShapeConfig("dynamic", 1, 2, 40, 40)
    what = machines(loaded, form, shape, cache)

    on_cpu = scored(what, loaded, form, STRATEGY, "fp32")
    on_gpu = scored(replace(what, executed="engine"), loaded, form, STRATEGY, "fp32")

    assert (on_cpu.window, on_cpu.places) == (40, 40)
    assert (on_gpu.window, on_gpu.places) == ((40, 1) if cache == "none" else (128, 89))
    for each in (on_cpu, on_gpu):
        found = cost(each, loaded, text)
        assert found.perplexity.value < 40 and abs(found.increase.value) < 1e-4 and found.kl < 1e-6
        assert found.top1_agreement == 1 and found.greedy.parted == 0


def test_an_engine_of_one_length_and_one_logit_a_pass_looks_at_fewer_places() -> None:
    what = Scored("engine", lambda tokens: tokens, 1, 2048, 1)
    machine = Machine("engine", lambda inputs: inputs["input_ids"], ShapeConfig("static", 1, 2048, 2048, 2048))
    found = scored(machine, None, ModelConfig("m"), STRATEGY, "fp16")  # type: ignore[arg-type]

    assert (found.window, found.places) == (what.window, what.places)
    assert quality.ONE_PLACE_TOKENS // found.window == 1250


# ---- a whole run


def test_what_a_quantised_precision_costs_is_measured_unasked_and_too_much_of_it_ends_the_run(
    store: str, taught: Path, tmp_path: Path
) -> None:
    asked = ["precision=int4_weights", "quantize.block=32", "verify.max_perplexity_increase=0.001", *SMALL]
    outcome = do(store, tmp_path, taught, *asked)

    assert failure(outcome) == ("verify", "quality")
    report = outcome.report
    assert report["verify"]["passed"] and report["quality"]["passed"] is False  # the engine is right, and bad
    assert "verify.max_perplexity_increase=0.001 allows +0.10%" in report["failure"]["message"]
    found = report["quality"]["cost"]
    assert found["executed"] == report["verify"]["executed"] and found["text"] == texts.DOCSTRINGS
    assert found["tokens"] >= (20_000 if GPU else 2_000) and found["reference"] == "the unquantised model in float32"
    assert found["increase"]["value"] > 0.001 and found["kl"] > 1e-3 and found["top1_agreement"] < 1
    said = described(report)
    assert f"| quality | FAILED: perplexity {found['perplexity']['value']:.4g} (" in said and "allowed +0.10%" in said


@pytest.mark.slow
def test_what_a_run_found_of_its_precision_is_that_of_the_stored_engine_where_it_is_asked_the_same(
    store: str, taught: Path, tmp_path: Path
) -> None:
    def judged(*asked: str) -> dict[str, Any]:
        kept = ["store.enabled=true", f"store.folder={tmp_path / 'engines'}"]
        outcome = do(store, tmp_path / "runs", taught, "precision=bf16", *SMALL, *kept, *asked)
        assert outcome.report["status"] == DONE
        return outcome.report

    first = judged("verify.quality=true")
    again = judged("verify.quality=true")
    unasked = judged()
    stricter = judged("verify.quality=true", "verify.max_perplexity_increase=0.04")

    assert 0 < first["quality"]["cost"]["kl"] < 0.01 and first["quality"]["passed"]
    assert not first["store"]["hit"] and again["store"]["hit"] and unasked["store"]["hit"]
    assert again["quality"]["cost"]["perplexity"] == first["quality"]["cost"]["perplexity"]
    assert stricter["store"]["hit"] == GPU and stricter["quality"]["max_increase"] == 0.04


@pytest.mark.slow
def test_fp16_costs_smollm2_nothing(store: str, tmp_path: Path) -> None:
    asked = ["model=smollm2_135m", "verify.quality=true", "shape.max=512", "shape.exact=[]", "benchmark=none"]
    report = run(compose_config([*asked, f"tracking.uri={store}", f"output={tmp_path}"])).report

    found = report["quality"]["cost"]
    assert report["status"] == DONE and report["quality"]["passed"]
    assert 8 < found["perplexity"]["value"] < 20 and abs(found["increase"]["value"]) < 0.002
    assert found["kl"] < 0.001 and found["top1_agreement"] > 0.98


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("cache", ["none", "in_engine"])
def test_an_engine_is_measured_in_the_form_in_which_it_answers(
    cache: str, store: str, taught: Path, tmp_path: Path
) -> None:
    asked = ["precision=int8_weights", f"cache={cache}", "shape.max=64", "shape.exact=[]", "benchmark=none"]
    report = do(store, tmp_path, taught, *asked).report

    found = report["quality"]["cost"]
    assert report["status"] == DONE and found["executed"] == "engine" and found["tokens"] >= 20_000
    assert abs(found["increase"]["value"]) < 0.05 and found["top1_agreement"] > 0.9


def test_nothing_is_measured_of_random_weights_or_without_a_tokenizer_and_the_report_says_so(
    taught: Path, loaded: LoadedModel
) -> None:
    asked = VerifyConfig(quality=True)
    drawn = quality.text_for(asked, replace(loaded, weights="random"))
    mute = quality.text_for(asked, replace(loaded, tokenizer=None))
    small = quality.text_for(asked, replace(loaded, came_as="GPTQ int4"))

    assert "random weights" in str(drawn) and "no tokenizer" in str(mute)
    assert "come as GPTQ int4" in str(small)
    unjudged = quality.judge(None, loaded, form_of(taught), STRATEGY, asked, drawn, "fp16", lambda *_: None)  # type: ignore[arg-type]
    assert unjudged == Quality("random weights predict no text", None, 0.05, None)
    quality.gate(unjudged)
    assert VerifyConfig().judges_quality("int8_weights") and not VerifyConfig().judges_quality("fp16")


# ---- bad input


@pytest.fixture
def refusal(taught: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which a run is refused, by its settings or by the load stage; the exit code is 2."""

    def refused(*settings: str) -> str:
        capsys.readouterr()
        try:
            code = _main(["model=local", f"model.path={taught}", "tracking.uri=sqlite:///ml.db", *settings])
        except UserError as error:
            return str(error)
        assert code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refused


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("verify.text=none.txt", ["verify.text=none.txt", "no such file"]),
        ("verify.text=a, b.txt", ["verify.text=a, b.txt", "no such file"]),
        ("verify.text=short.txt", ["verify.text=short.txt", "holds 300 tokens", "at least 2"]),
        ("verify.text=bytes.bin", ["verify.text=bytes.bin", "no UTF-8"]),
        ("verify.max_perplexity_increase=nan", ["verify.max_perplexity_increase=nan", "from 0"]),
        ("verify.max_perplexity_increase=inf", ["verify.max_perplexity_increase=inf", "null"]),
        ("verify.max_perplexity_increase=-0.1", ["verify.max_perplexity_increase=-0.1", "from 0"]),
        ("verify.max_perplexity_increase=some", ["verify.max_perplexity_increase=some", "a number"]),
        ("verify.quality=maybe", ["verify.quality=maybe", "true or false"]),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line_and_nothing_is_created(
    setting: str, parts: list[str], refusal: Callable[..., str], cwd: Path
) -> None:
    (cwd / "short.txt").write_text("abc" * 100)
    (cwd / "bytes.bin").write_bytes(b"\xff\xfe" * 2000)
    before = sorted(cwd.iterdir())

    line = refusal("verify.quality=true", setting)

    for part in parts:
        assert part in line
    assert sorted(cwd.iterdir()) == before


def test_a_limit_or_a_text_that_has_no_part_in_the_run_is_refused(refusal: Callable[..., str], cwd: Path) -> None:
    for setting in ("verify.max_perplexity_increase=0.01", "verify.text=null"):
        assert "verify.quality=true does" in refusal(setting)
    assert list(cwd.iterdir()) == []
