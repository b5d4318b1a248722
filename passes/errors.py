"""The two ways in which something goes wrong: the user's and the run's."""

from __future__ import annotations


class UserError(ValueError):
    """What was asked for cannot be done as asked.

    The message is one line that names the key, the value, and what is allowed or what to do.
    The command line prints it and exits with 2; nothing has been created.
    """


class RunError(RuntimeError):
    """A run that was started could not be finished: exit code 1, and the report says why.

    ``kind`` is a short, stable word for the report and for comparisons (``accuracy``,
    ``unsupported_op``, ``unproven``, ``build``, ``out_of_memory``, ...).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def first_line(error: BaseException) -> str:
    """What ``error`` is, in one line."""
    return f"{type(error).__name__}: {message_line(error) if str(error).strip() else 'no reason given'}"


def message_line(error: BaseException | str) -> str:
    """The first line of an error's message, or of the message itself; of an error without one its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def whole_message(error: BaseException) -> str:
    """All of an error's message as one line; its type's name where there is none."""
    return " ".join(str(error).split()) or type(error).__name__


AS_IT_IS = "backend=torch_compile and backend=eager run the model as it is"
"""What helps where a model cannot become an engine."""
