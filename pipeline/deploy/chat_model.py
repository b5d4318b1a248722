"""What MLflow loads for a logged model: chat messages in, an answer with token counts out.

Requests and answers are those of :class:`mlflow.pyfunc.ChatModel`, which is OpenAI's form.  Not that class itself: it
is pickled, has the engine answer once while it is logged, and cannot tell a temperature that was left out from 1.0.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.types.llm import (
    ChatChoice,
    ChatChoiceDelta,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatMessage,
    TokenUsageStats,
)

from passes.errors import RunError, UserError, message_line
from pipeline.deploy import opened
from pipeline.deploy.answering import Answer, Answerer
from pipeline.deploy.request import read

_log = logging.getLogger(__name__)


class ChatModel:
    """A model that is open; MLflow calls :meth:`predict` and :meth:`predict_stream`, in several threads at once."""

    def __init__(self, answerer: Answerer, name: str) -> None:
        self.answerer = answerer
        self.name = name

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request, see docs/deploy.md; raises ``MlflowException``, which the server makes status 400 of
        where the request is wrong."""
        with _as_mlflow_errors():
            answer = self.answerer.answer(read(model_input, self.answerer.settings))
        message = ChatMessage(role="assistant", content=answer.text)
        made: dict[str, Any] = ChatCompletionResponse(
            choices=[ChatChoice(message=message, finish_reason=answer.finish_reason)],
            usage=_usage(answer),
            id=_new_id(),
            model=self.name,
            custom_outputs=self._notes(),
        ).to_dict()
        return made

    def predict_stream(
        self, model_input: Any, params: dict[str, Any] | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """The same in pieces; the last chunk says how it ended, and counts."""
        name = _new_id()

        def chunk(choice: ChatChunkChoice, **more: Any) -> dict[str, Any]:
            made: dict[str, Any] = ChatCompletionChunk(choices=[choice], id=name, model=self.name, **more).to_dict()
            return made

        with _as_mlflow_errors():
            asked = {key: value for key, value in dict(model_input).items() if key != "stream"}
            pieces = self.answerer.stream(read(asked, self.answerer.settings))
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    answer: Answer = end.value
                    break
                yield chunk(ChatChunkChoice(delta=ChatChoiceDelta(content=piece)))
        last = ChatChunkChoice(delta=ChatChoiceDelta(content=""), finish_reason=answer.finish_reason)
        yield chunk(last, usage=_usage(answer), custom_outputs=self._notes())

    def _notes(self) -> dict[str, Any] | None:
        return {"notes": list(self.answerer.notes)} if self.answerer.notes else None


def _load_pyfunc(data_path: str, model_config: dict[str, Any] | None = None) -> ChatModel:
    """MLflow's entry: ``data_path`` is the folder that :mod:`pipeline.deploy.log` wrote.  Raises :class:`UserError`
    before anything large is loaded."""
    on_cpu = (model_config or {}).get("on_cpu")
    model = opened.open_model(Path(data_path), on_cpu, mlflow.get_tracking_uri(), _log.info)
    for note in model.answerer.notes:
        _log.warning(note)
    return ChatModel(model.answerer, model.name)


@contextmanager
def _as_mlflow_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise MlflowException(message_line(error), error_code=INVALID_PARAMETER_VALUE) from None
    except RunError as error:
        raise MlflowException(f"{error.kind}: {message_line(error)}", error_code=INTERNAL_ERROR) from error


def _usage(answer: Answer) -> TokenUsageStats:
    both = answer.prompt_tokens + answer.completion_tokens
    return TokenUsageStats(answer.prompt_tokens, answer.completion_tokens, both)


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
