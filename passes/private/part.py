"""The one way to a private part of a library, which says so plainly when a newer library no longer has it."""

from __future__ import annotations

import pkgutil
import sys
from typing import Any

from passes.errors import UserError


def part(name: str) -> Any:
    """What ``name`` (``package.module:object.attribute``) stands for; raises :class:`UserError` where it is gone."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise _gone(name.replace(":", ".")) from error


def attribute(owner: Any, name: str) -> Any:
    """``owner.name``, of an object of a library's; raises :class:`UserError` where it is gone."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise _gone(f"{type(owner).__module__}.{type(owner).__qualname__}.{name}") from error


def _gone(name: str) -> UserError:
    library = name.partition(".")[0]
    version = getattr(sys.modules.get(library), "__version__", "as it is installed")
    return UserError(
        f"{library} {version}: has no {name} any more, a part that is private to it and that is used here; "
        "install a version that pyproject.toml names"
    )
