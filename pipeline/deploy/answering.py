"""A conversation becomes tokens, and the tokens that a writer adds to them become text, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.errors import UserError, message_line
from pipeline.deploy.request import Request, Settings
from pipeline.deploy.writers import Writer
from pipeline.generate.greedy import chat_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_CHAT_FORM = "the tokenizer has no chat form: the text of the messages is continued as it stands"
BROKEN = "\ufffd"
"""What stands for bytes that are no character, or not yet."""


@dataclass(frozen=True)
class Answer:
    """What was answered."""

    text: str
    finish_reason: str
    """``stop``: it came to its end; ``length``: it was cut off."""
    prompt_tokens: int
    completion_tokens: int
    """Without the token that ends it."""


class Answerer:
    """Answers one request after another: whoever comes while another is answered waits, and nothing is mixed up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, writer: Writer, settings: Settings) -> None:
        self.settings = settings
        self.notes = () if tokenizer.chat_template else (NO_CHAT_FORM,)
        """What is to be said to who asks."""
        self._tokenizer, self._writer, self._stop = tokenizer, writer, frozenset(settings.stop)
        self._alone = threading.Lock()

    def answer(self, request: Request) -> Answer:
        """The whole answer; raises :class:`UserError` where there is no room for it."""
        pieces = self.stream(request)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                answer: Answer = end.value
                return answer

    def stream(self, request: Request) -> Generator[str, None, Answer]:
        """The answer as it comes, in pieces of whole characters, and returns it; closed, it ends there.

        Until it is at its end, or closed, others wait.
        """
        with self._alone:  # a tokenizer is not made for several at once either
            prompt = self._prompt(request.messages)
            new_tokens = self._room(len(prompt), request.max_tokens)
            text, told, tokens, reason = Text(self._tokenizer), 0, 0, "length"
            with closing(self._writer.steps(prompt, new_tokens, request.sampling)) as steps:
                for token in steps:
                    if token in self._stop:
                        reason = "stop"
                        break
                    tokens += 1
                    text.add(token)
                    if _first(request.stop, text.whole) is not None:
                        break
                    sure = len(text.whole) - _begun(request.stop, text.whole)
                    if sure > told:
                        yield text.whole[told:sure]
                        told = sure
            text.finish()
            whole, end = text.whole, _first(request.stop, text.whole)
            if end is not None:
                whole, reason = whole[:end], "stop"
            if len(whole) > told:
                yield whole[told:]
            return Answer(whole, reason, len(prompt), tokens)

    def _prompt(self, messages: tuple[dict[str, str], ...]) -> list[int]:
        try:
            return chat_form(self._tokenizer, messages)
        except Exception as error:  # a template refuses what it has no form for in words of its own
            raise UserError(f"messages: the model's chat form refuses them ({message_line(error)})") from None

    def _room(self, prompt: int, asked: int | None) -> int:
        """How many tokens to write behind ``prompt`` tokens."""
        writer = self._writer
        if not writer.shortest <= prompt <= writer.longest_prompt:
            allowed = f"from {writer.shortest} to {writer.longest_prompt}"
            raise UserError(f"messages: they are {prompt} tokens, and the engine takes {allowed}")
        room = writer.longest - prompt
        if room < 1 or (asked or 0) > room:
            wanted = "" if asked is None else f"max_tokens={asked}: "
            raise UserError(f"{wanted}behind {prompt} tokens of messages there is room for {room} more")
        return min(self.settings.max_tokens, room) if asked is None else asked


class Text:
    """Text of tokens that come one after another; ``whole`` never ends within a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.whole = ""
        self._tokenizer, self._tokens = tokenizer, list[int]()
        self._context, self._settled = 0, 0  # a token's text hangs on those before it, such as whether it has a space

    def add(self, token: int) -> None:
        self._tokens.append(token)
        self._take(finished=False)

    def finish(self) -> None:
        """What is not a whole character by now never will be."""
        self._take(finished=True)

    def _take(self, finished: bool) -> None:
        before = self._decoded(self._tokens[self._context : self._settled])
        now = self._decoded(self._tokens[self._context :])
        if len(now) > len(before) and (finished or not now.endswith(BROKEN)):
            self.whole += now[len(before) :]
            self._context, self._settled = self._settled, len(self._tokens)

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _first(stops: tuple[str, ...], text: str) -> int | None:
    """Where the first of ``stops`` begins in ``text``."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _begun(stops: tuple[str, ...], text: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of one of ``stops``."""
    sizes = (size for stop in stops for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
    return max(sizes, default=0)
