"""Rival generators on the CPU: the tokens that Hugging Face's ``generate`` chooses, with every cache, padded or not."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from passes.errors import RunError, UserError
from pipeline.config.schema import BackendConfig, CacheConfig
from pipeline.model import limits
from pipeline.model.load import LoadedModel
from pipeline.rivals.generation import CompiledGenerator, EagerGenerator, rival_generator
from pipeline.rivals.kernels import Kernels, kernels_of

LENGTH, NEW = 9, 7
COMPILED = partial(torch.compile, backend="aot_eager", dynamic=False, fullgraph=True)  # Inductor takes a minute here


def padding() -> Tensor:
    """[2, LENGTH]: the first row is padded on the left."""
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, :4] = True
    return mask


def expected(name: str, tokens: Tensor, padded: Tensor | None, new: int = NEW) -> Tensor:
    """What Hugging Face's own ``generate`` chooses, without early stop."""
    real = torch.ones_like(tokens) if padded is None else (~padded).long()
    out = tiny.model(name).generate(
        tokens, attention_mask=real, do_sample=False, max_new_tokens=new, min_new_tokens=new, use_cache=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[:, tokens.shape[1] :]


def generator(name: str, backend: str, cache: str, capacity: int | None = None):
    model = tiny.model(name)
    if backend == "eager":
        return EagerGenerator(model, cache, capacity, Kernels(model))
    return CompiledGenerator(model, cache, capacity, Kernels(model), COMPILED, graphs=True)


def run(made, new: int = NEW) -> Tensor:
    made.prefill()
    for _ in range(new - 1):
        made.decode()
    return made.tokens()


@pytest.mark.parametrize(("name", "padded"), [("llama", False), ("qwen3", True)], ids=["llama", "qwen3 left padding"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_eager_generation_chooses_what_hugging_face_does(name: str, cache: str, padded: bool) -> None:
    tokens, mask = tiny.tokens(2, LENGTH), padding() if padded else None
    made = generator(name, "eager", cache)
    made.prepare(tokens, NEW, mask)

    assert torch.equal(made.tokens(), expected(name, tokens, mask))
    assert torch.equal(run(made), expected(name, tokens, mask)), "a second generation starts afresh"


@pytest.mark.parametrize(
    ("cache", "padded"), [("none", True), ("static", True), ("static", False)], ids=lambda value: str(value)
)
def test_compiled_generation_chooses_what_hugging_face_does(cache: str, padded: bool) -> None:
    tokens, mask = tiny.tokens(2, LENGTH), padding() if padded else None
    made = generator("qwen3", "torch_compile", cache)
    made.prepare(tokens, NEW, mask)

    assert torch.equal(made.tokens(), expected("qwen3", tokens, mask))
    bound, other = made.generation, tiny.tokens(2, LENGTH, seed=7)
    made.prepare(other, NEW, mask)
    assert torch.equal(made.tokens(), expected("qwen3", other, mask)), "other prompts of the same shape"
    assert made.generation == bound
    assert made.cuda_graph is False, "there is no CUDA here"


def test_a_model_with_a_window_keeps_what_its_window_needs() -> None:
    window = {"sliding_window": 5}
    model = tiny.model("mistral", **window)
    tokens = tiny.tokens(1, LENGTH)
    made = [EagerGenerator(model, cache, None, Kernels(model)) for cache in ("none", "static")]
    for each in made:
        each.prepare(tokens, NEW)

    assert torch.equal(made[0].tokens(), made[1].tokens())
    assert torch.equal(run(made[1]), made[0].tokens())


def test_other_prompts_of_the_same_shape_bind_nothing_again() -> None:
    made = generator("llama", "eager", "static")
    made.prepare(tiny.tokens(1, LENGTH), NEW)
    bound = made.generation
    other = tiny.tokens(1, LENGTH, seed=7)
    made.prepare(other, NEW)

    assert made.generation == bound
    assert torch.equal(made.tokens(), expected("llama", other, None))
    made.prepare(other, NEW - 1)
    assert made.generation > bound and made.tokens().shape == (1, NEW - 1)


def test_decoding_waits_for_nothing_and_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generator("llama", "eager", "static")
    made.prepare(tiny.tokens(1, LENGTH), NEW)

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read back from the device")

    made.prefill()
    for name in ("item", "tolist", "__bool__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    made.decode()


def test_a_capacity_below_the_generation_is_refused_by_its_key() -> None:
    made = generator("llama", "eager", "static", capacity=LENGTH)
    with pytest.raises(UserError, match=r"cache.capacity=9: 9 tokens of the prompt and 7 new ones are 16"):
        made.prepare(tiny.tokens(1, LENGTH), NEW)


def test_what_cannot_be_compiled_fails_the_run_as_torch_compile() -> None:
    def broken(function):
        def run() -> None:
            torch._dynamo.graph_break()
            function()

        return torch.compile(run, backend="eager", fullgraph=True)

    model = tiny.model("llama")
    made = CompiledGenerator(model, "none", None, Kernels(model), broken, graphs=False)
    with pytest.raises(RunError) as caught:
        made.prepare(tiny.tokens(1, LENGTH), NEW)
    assert caught.value.kind == "torch_compile"


def test_flex_attention_is_that_of_a_pass_and_the_model_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks leave out what a window does not see; what compares it is PyTorch's own way."""
    from transformers.integrations import flex_attention

    seen: list[object] = []
    real = flex_attention.compile_friendly_flex_attention

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("block_mask"))
        return real(*args, **kwargs)

    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", noted)
    model = tiny.model("mistral", sliding_window=5)
    tokens = tiny.tokens(2, LENGTH)
    backend = BackendConfig("torch_compile", mode="default", attention="flex_attention")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # transformers compiles it, for a minute
        own = model(tokens).logits
        with kernels_of(backend, model)():
            found = model(tokens).logits
        again = model(tokens).logits

    assert len(seen) == model.config.num_hidden_layers and None not in seen
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    assert torch.equal(own, again)


def test_flex_attention_of_a_model_that_has_none_is_refused() -> None:
    def check(name: str) -> None:
        loaded = LoadedModel(tiny.model(name), None, name, "a test", None, None, 0, "random")
        limits.check_attention(loaded, BackendConfig("torch_compile", mode="default", attention="flex_attention"))

    check("llama")
    with pytest.raises(UserError, match=r"backend.attention=flex_attention: GPT2LMHeadModel has none"):
        check("gpt2")


def test_the_settings_choose_the_generator() -> None:
    model = tiny.model("llama")
    eager = rival_generator(model, BackendConfig("eager", cudnn_attention=False), CacheConfig("dynamic"))
    compiled = rival_generator(
        model, BackendConfig("torch_compile", mode="reduce-overhead", cudnn_attention=False), CacheConfig("static")
    )

    assert isinstance(eager, EagerGenerator) and isinstance(compiled, CompiledGenerator)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("backend", ["eager", "torch_compile"])
def test_tokens_that_are_still_on_their_way_are_waited_for(backend: str) -> None:
    """The buffer of the tokens was read before its zeros were written: an embedding at whatever stood there."""
    model = copy.deepcopy(tiny.model("llama")).cuda()
    prompt = tiny.tokens(1, LENGTH)
    mode = "reduce-overhead" if backend == "torch_compile" else None

    def chosen(milliseconds: int) -> list[int]:
        made = rival_generator(model, BackendConfig(backend, mode=mode, cudnn_attention=False), CacheConfig("static"))
        what_was_there_before = [torch.full((1, size), 2**40, device="cuda") for size in (LENGTH + NEW, 64)]
        torch.cuda.synchronize()
        del what_was_there_before
        torch.cuda._sleep(milliseconds * 2_000_000)  # cycles of the caller's stream
        made.prepare(prompt, NEW)
        return made.tokens()[0].tolist()

    assert chosen(milliseconds=200) == chosen(milliseconds=0)
