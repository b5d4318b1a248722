"""What a model is, and how a module collects its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from passes.terms import Index, Term

if TYPE_CHECKING:
    from passes.symbolic import Evaluator

Model = Callable[["Evaluator", Any, Index], Term]


def models(registry: dict[Any, Model]) -> Callable[..., Callable[[Model], Model]]:
    """A decorator that enters a model into ``registry`` under the operations that it is given."""

    def of(*targets: Any) -> Callable[[Model], Model]:
        def register(model: Model) -> Model:
            registry.update(dict.fromkeys(targets, model))
            return model

        return register

    return of


def arguments(node: Any, *defaults: Any) -> tuple[Any, ...]:
    """The arguments of ``node`` with those that it leaves out; the first has no default."""
    return (*node.args, *defaults[len(node.args) - 1 :])
