"""What a model is, how a module collects its own, and how a model reads its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from passes.private.of_torch import schema_of
from passes.proof.terms import Index, Term, Unmodelled

if TYPE_CHECKING:
    from passes.proof.symbolic import Evaluator

Model = Callable[["Evaluator", Any, Index], Term]

RECORDED = frozenset(["dtype", "size", "shape"])
"""Arguments that say of which type and shape the result is: recorded with the node itself."""
WITHOUT_EFFECT = frozenset(["layout", "device", "pin_memory", "memory_format", "non_blocking", "implicit"])
"""Arguments that change no element: where a tensor lies, and how."""


def models(registry: dict[Any, Model]) -> Callable[..., Callable[[Model], Model]]:
    """A decorator that enters a model into ``registry`` under the operations that it is given."""

    def of(*targets: Any) -> Callable[[Model], Model]:
        def register(model: Model) -> Model:
            registry.update(dict.fromkeys(targets, model))
            return model

        return register

    return of


def arguments(node: Any, *names: str) -> tuple[Any, ...]:
    """The arguments of ``node`` that its operation's schema calls ``names``, the schema's defaults among them.

    Raises :class:`passes.proof.terms.Unmodelled` where the node sets any other argument: a model that does not read it
    would be right only where it does nothing.
    """
    schema = schema_of(node.target)
    if schema is None:
        raise Unmodelled("no operation of torch's")
    found: dict[str, Any] = {}
    for place, argument in enumerate(schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, default)
        if argument.name in names:
            found[argument.name] = value
        elif argument.name not in RECORDED | WITHOUT_EFFECT and value != default:
            raise Unmodelled(f"an argument {argument.name} that is not read")
    return tuple(found[name] for name in names)
