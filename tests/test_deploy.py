"""What answers: requests read strictly, text made of tokens, and every form of a run's graph as a writer of it."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import CONF
from serving import characters

from passes.errors import UserError
from pipeline.config.schema import CacheConfig, ShapeConfig, StrategyConfig
from pipeline.deploy.answering import NO_CHAT_FORM, Answerer, Text
from pipeline.deploy.described import graph_hash
from pipeline.deploy.log import REQUIRED, requirements
from pipeline.deploy.request import Settings, read
from pipeline.deploy.writers import CachedWriter, PrefixWriter, Writer, why_none
from pipeline.engine import programs
from pipeline.engine.session import GraphSession
from pipeline.generate.sampling import Sampling
from pipeline.verify.candidate import graph_generator

GREEDY = Sampling()


def asked(content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({}, "messages: missing"),
        ([], "a request is an object"),
        ({"messages": []}, "messages=[]"),
        ({"messages": "hello"}, "messages='hello'"),
        ({"messages": ["hello"]}, "messages[0]='hello'"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages[0].role='robot': allowed are system, user, assistant",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role=None"),
        ({"messages": [{"role": "user"}]}, "messages[0].content=None"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content=''"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content=5"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        (asked(max_tokens=0), "max_tokens=0"),
        (asked(max_tokens=-3), "max_tokens=-3"),
        (asked(max_tokens=True), "max_tokens=True"),
        (asked(max_tokens=2.5), "max_tokens=2.5"),
        (asked(max_tokens="4"), "max_tokens='4'"),
        (asked(temperature=math.nan), "temperature=nan"),
        (asked(temperature=math.inf), "temperature=inf"),
        (asked(temperature=-1), "temperature=-1"),
        (asked(temperature=True), "temperature=True"),
        (asked(temperature="hot"), "temperature='hot'"),
        (asked(top_p=0), "top_p=0"),
        (asked(top_p=1.5), "top_p=1.5"),
        (asked(seed=-1), "seed=-1"),
        (asked(seed=2**64), "seed="),
        (asked(stop=[""]), "stop=['']"),
        (asked(stop=5), "stop=5"),
        (asked(stream=True), "stream=True: is not served here"),
        (asked(n=2), "n=2"),
        (asked(top_k=5), "top_k=5"),
        (asked(max_token=5), "'max_token': no such key; allowed are messages, max_tokens"),
    ],
)
def test_what_is_not_as_it_must_be_is_refused_in_one_line(request_: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        read(request_, Settings())
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_a_request_that_leaves_out_is_greedy_and_one_that_draws_differs_from_the_next() -> None:
    plain = read(asked(n=1, stream=False, temperature=None, tools=None), Settings())
    assert plain.sampling == GREEDY and plain.max_tokens is None
    first, second = (read(asked(temperature=1), Settings()).sampling for _ in range(2))
    assert first.temperature == 1.0 and first.seed != second.seed
    assert read(asked(temperature=1, seed=3, top_p=0.5), Settings()).sampling == Sampling(1.0, 0.5, 3)


class Written:
    """A writer of a text that is known beforehand, whatever is asked."""

    shortest, longest_prompt, longest = 2, 40, 60

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.prompts = tokens, list[list[int]]()

    def steps(self, prompt: list[int], new_tokens: int, sampling: Sampling) -> Generator[int]:
        self.prompts.append(prompt)
        yield from self.tokens[:new_tokens]


def test_pieces_are_whole_characters_and_make_the_answer() -> None:
    tokenizer, said = characters(), "Grüße, 世界 👋!"
    writer = Written(tokenizer(said).input_ids)
    pieces = list(Answerer(tokenizer, writer, Settings(max_tokens=30)).stream(read(asked(), Settings())))
    assert "".join(pieces) == said and all("\ufffd" not in piece for piece in pieces)
    assert pieces[2:4] == ["ü", "ß"]
    cut = Text(tokenizer)
    cut.add(tokenizer("世").input_ids[0])
    assert cut.whole == ""
    cut.finish()
    assert cut.whole == "\ufffd", "what is never completed is not hidden either"


def test_an_answer_ends_at_a_token_a_text_or_its_length_and_says_so() -> None:
    tokenizer = characters()
    end = tokenizer("~").input_ids[0]
    answerer = Answerer(tokenizer, Written(tokenizer("one, two~three").input_ids), Settings(10, stop=(end,)))
    ended, cut, stopped = (
        answerer.answer(read(asked(**more), Settings())) for more in ({}, {"max_tokens": 5}, {"stop": [", tw", "zzz"]})
    )
    assert (ended.text, ended.finish_reason, ended.completion_tokens) == ("one, two", "stop", 8)
    assert (cut.text, cut.finish_reason, cut.completion_tokens) == ("one, ", "length", 5)
    assert (stopped.text, stopped.finish_reason) == ("one", "stop")
    pieces = list(answerer.stream(read(asked(stop=[", twenty"]), Settings())))
    assert "".join(pieces) == "one, two" and pieces[:3] == ["o", "n", "e"], "the beginning of a stop is held back"


def test_a_prompt_without_room_is_refused_and_the_room_is_named() -> None:
    answerer = Answerer(characters(), Written([1]), Settings())
    for request, said in (
        (asked("x" * 100), "messages: they are 105 tokens, and the engine takes from 2 to 40"),
        (asked("x" * 10, max_tokens=10**6), "max_tokens=1000000: behind 15 tokens of messages there is room for 45"),
    ):
        with pytest.raises(UserError, match=said):
            answerer.answer(read(request, Settings()))
    assert answerer.answer(read(asked(), Settings())).completion_tokens == 1, "and the next is answered"


def test_a_tokenizer_without_a_chat_form_continues_the_text_and_says_so() -> None:
    tokenizer, writer = characters(None), Written([1])
    answerer = Answerer(tokenizer, writer, Settings())
    answerer.answer(read(asked("one two"), Settings()))
    assert answerer.notes == (NO_CHAT_FORM,)
    assert writer.prompts == [tokenizer("one two").input_ids]
    assert Answerer(characters(), writer, Settings()).notes == ()


def test_a_chat_form_that_refuses_is_an_error_of_the_request() -> None:
    answerer = Answerer(characters("{{ raise_exception('no system here') }}"), Written([1]), Settings())
    with pytest.raises(UserError, match=r"^messages: .*no system here"):
        answerer.answer(read(asked(), Settings()))


def test_several_at_once_are_answered_one_after_another() -> None:
    tokenizer, inside, most = characters(), [0], [0]

    class Slow(Written):
        def steps(self, prompt: list[int], new_tokens: int, sampling: Sampling) -> Generator[int]:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            for token in prompt[2:6]:
                threading.Event().wait(0.005)
                yield token
            inside[0] -= 1

    answerer, answers = Answerer(tokenizer, Slow([]), Settings()), dict[str, str]()

    def ask(text: str) -> None:
        answers[text] = answerer.answer(read(asked(text), Settings())).text

    threads = [threading.Thread(target=ask, args=(f"q{i:02}!",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {f"q{i:02}!": f"q{i:02}!" for i in range(12)} and most == [1]


def test_a_stream_that_is_closed_lets_the_next_one_in() -> None:
    tokenizer = characters()
    answerer = Answerer(tokenizer, Written(tokenizer("abcdef").input_ids), Settings())
    stream = answerer.stream(read(asked(), Settings()))
    assert next(stream) == "a"
    stream.close()
    assert answerer.answer(read(asked(), Settings())).text == "abcdef"


def writer(mode: str, shape: ShapeConfig, inputs: tuple[str, ...] = ("input_ids",)) -> Writer:
    """The graphs of a tiny Llama as a run with ``cache=mode`` rewrites them."""
    model, form = tiny.model("llama"), tiny.config("llama", inputs)
    cache = programs.cache_of(model, CacheConfig(mode), shape, None)
    made = {}
    for name, trace in programs.parts(model, form, shape, cache).items():
        made[name] = programs.rewritten(trace(), StrategyConfig("detect_causal"))
    if cache is not None:
        return CachedWriter(graph_generator(made, cache, 128, "fp32"), shape)
    module = made["engine"].program.module()
    session = GraphSession(lambda **given: (module(**given),), tuple(inputs))
    return PrefixWriter(session, list(inputs), shape, "last" not in inputs, 128, torch.float32, tiny.CPU)


def hugging_face(prompt: list[int], new: int) -> list[int]:
    generated = tiny.model("llama").generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(generated[0, len(prompt) :].tolist())


@pytest.mark.parametrize(
    ("mode", "shape", "inputs"),
    [
        ("none", ShapeConfig("dynamic", 1, 1, 24, 24), ("input_ids",)),
        ("none", ShapeConfig("dynamic", 1, 1, 24, 24), ("input_ids", "attention_mask", "position_ids")),
        ("none", ShapeConfig("static", 1, 24, 24, 24), ("input_ids", "last")),
        ("static", ShapeConfig("dynamic", 1, 1, 24, 24), ("input_ids",)),
        ("in_engine", ShapeConfig("dynamic", 1, 1, 24, 24), ("input_ids",)),
        ("in_engine", ShapeConfig("static", 2, 24, 24, 24), ("input_ids",)),
    ],
    ids=["none", "none_masked", "none_one_length", "static", "in_engine", "in_engine_one_length"],
)
def test_every_form_of_a_run_writes_what_hugging_face_generates(
    mode: str, shape: ShapeConfig, inputs: tuple[str, ...]
) -> None:
    made = writer(mode, shape, inputs)
    first, second = (tiny.tokens(1, length, length)[0].tolist() for length in (9, 5))
    assert list(made.steps(first, 8, GREEDY)) == hugging_face(first, 8)
    begun = made.steps(second, 8, GREEDY)
    assert next(begun) == hugging_face(second, 1)[0]
    begun.close()
    assert list(made.steps(first, 3, GREEDY)) == hugging_face(first, 3), "what was begun before is not seen"
    hot = [list(made.steps(first, 8, Sampling(1.5, 0.9, seed))) for seed in (1, 2, 1)]
    assert hot[0] == hot[2] != hot[1]
    assert (made.longest_prompt, made.shortest) == (24, 1)


@pytest.mark.parametrize(
    ("shape", "cached", "inputs", "said"),
    [
        (ShapeConfig("dynamic"), False, ["input_ids"], None),
        (ShapeConfig("static"), False, ["input_ids", "last"], None),
        (ShapeConfig("static"), False, ["input_ids"], "takes 2048 tokens and no other"),
        (ShapeConfig("dynamic", 4), False, ["input_ids"], "shape.batch=4"),
        (ShapeConfig("dynamic", 4), True, ["input_ids"], None),
        (ShapeConfig("static"), True, ["input_ids"], "set shape=dynamic"),
    ],
)
def test_an_engine_that_can_write_no_answer_says_why(
    shape: ShapeConfig, cached: bool, inputs: list[str], said: str | None
) -> None:
    found = why_none(shape, cached, inputs)
    assert (found is None) == (said is None) and (said or "") in (found or "")


def test_a_graph_is_the_same_wherever_it_was_traced() -> None:
    text = "%a = call_function[target=torch.ops.aten.arange.default](args = (%n,), kwargs = {device: %s})"
    on = [graph_hash(text.replace("%s", where)) for where in ("cpu", "cuda:0", "cuda")]
    assert on[0] == on[1] == on[2] != graph_hash(text.replace("arange", "ones"))


def test_the_requirements_are_those_of_the_project_and_exact() -> None:
    import tomllib

    project = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    ours = {line.split(">")[0].split("=")[0].strip() for line in project}
    assert set(REQUIRED) - {"torch-tensorrt", "torch-tensorrt-rtx", "tensorrt", "tensorrt_rtx"} <= ours
    assert all("==" in line for line in requirements()) and any(line.startswith("torch==") for line in requirements())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "RUN=nowhere: is no folder, no run id of 32 characters and no models:/NAME@ALIAS"),
        (["."], "RUN=.: holds no model that answers"),
        ([], "the following arguments are required: RUN"),
        (["a" * 32, "--on-cpu", "numpy"], "argument --on-cpu: invalid choice"),
        (["a" * 32, "--temperature", "nan"], "temperature=nan: must be a finite number"),
        (["a" * 32, "--once", ""], "messages[0].content=''"),
        (["a" * 32], "tracking.uri=sqlite:///mlflow.db: there is no"),
    ],
)
def test_a_command_that_cannot_be_done_is_one_line_before_anything_is_loaded(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    script = "import sys; from pipeline.chat import main; code = main(); print('torch' in sys.modules); exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path, env={"PYTHONPATH": str(CONF.parent)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert done.stdout == f"{arguments == ['a' * 32]}\n" and list(tmp_path.iterdir()) == []
