"""What is asked of a model, read strictly: whatever is not as it must be is refused in one line."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.errors import UserError

if TYPE_CHECKING:
    from pipeline.generate.sampling import Sampling

ROLES = ("system", "user", "assistant")
TAKEN = ("messages", "max_tokens", "temperature", "top_p", "seed", "stop")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "top_k": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "custom_inputs": ({},),
    "tools": ([],),
    "user": (),
}
"""Keys of the chat interface that are not served -> their values that ask for nothing."""
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """What holds where a request does not say it."""

    max_tokens: int = 256
    """Of an answer, or fewer where the engine has no room for as many."""
    temperature: float = 0.0
    """Greedy: that is what was verified."""
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    """Tokens that end an answer."""


@dataclass(frozen=True)
class Request:
    """A conversation to be continued."""

    messages: tuple[dict[str, str], ...]
    """Each with ``role`` and ``content``."""
    max_tokens: int | None
    """null: as the settings say, and as there is room for."""
    sampling: Sampling
    stop: tuple[str, ...]
    """Texts that end the answer; they are no part of it."""


def read(asked: Any, settings: Settings) -> Request:
    """The request ``asked``, as JSON has it; raises :class:`UserError` naming key, value and what is allowed."""
    if not isinstance(asked, Mapping):
        raise UserError(f"a request is an object with messages, and this is a {type(asked).__name__}")
    asked = {key: _plain(value) for key, value in asked.items()}
    for key, value in asked.items():
        if key in NEUTRAL:
            if value is not None and not any(_same(value, each) for each in NEUTRAL[key]):
                raise UserError(f"{key}={_shown(value)}: is not served here; leave it out")
        elif key not in TAKEN:
            raise UserError(f"{_shown(key)}: no such key; allowed are {', '.join(TAKEN)}")
    max_tokens = asked.get("max_tokens")
    if max_tokens is not None and (not _is_whole(max_tokens) or max_tokens < 1):
        raise UserError(f"max_tokens={_shown(max_tokens)}: must be a whole number of at least 1")
    temperature = _number(asked, "temperature", settings.temperature)
    top_p = _number(asked, "top_p", settings.top_p)
    if not 0 <= temperature <= 100:
        raise UserError(f"temperature={temperature}: must lie from 0, which is greedy, to 100")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must lie above 0 and be at most 1")
    seed = asked.get("seed")
    if seed is not None and (not _is_whole(seed) or not 0 <= seed <= LARGEST_SEED):
        raise UserError(f"seed={_shown(seed)}: must be a whole number from 0 to {LARGEST_SEED}")
    if temperature == 0:  # nothing is drawn
        top_p, seed = 1.0, 0
    messages, stops = _messages(asked.get("messages")), _stops(asked.get("stop"))
    from pipeline.generate.sampling import Sampling  # torch, which nobody need wait for to be refused

    sampling = Sampling(temperature, top_p, secrets.randbelow(2**31) if seed is None else seed)
    return Request(messages, max_tokens, sampling, stops)


def _messages(given: Any) -> tuple[dict[str, str], ...]:
    if given is None:
        raise UserError('messages: missing; they are a list such as [{"role": "user", "content": "Hello"}]')
    if not isinstance(given, list) or not given:
        raise UserError(f"messages={_shown(given)}: must be a list of at least one message")
    read = []
    for i, message in enumerate(given):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{i}]={_shown(message)}: must be an object with role and content")
        extra = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
        if extra:
            raise UserError(f"messages[{i}].{extra[0]}: is not served here; a message has role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"messages[{i}].role={_shown(role)}: allowed are {', '.join(ROLES)}")
        if not isinstance(content, str) or not content:
            raise UserError(f"messages[{i}].content={_shown(content)}: must be a text that is not empty")
        read.append({"role": str(role), "content": content})
    return tuple(read)


def _stops(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        raise UserError(f"stop={_shown(given)}: must be a list of texts that are not empty")
    return tuple(stops)


def _number(asked: Mapping[str, Any], key: str, default: float) -> float:
    value = asked.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key}={_shown(value)}: must be a finite number")
    return float(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """What MLflow makes a number or list of numpy's, as JSON has it."""
    return value.tolist() if type(value).__module__ == "numpy" else value


def _same(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _shown(value: Any) -> str:
    """``value`` in a line, and not all of what is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
