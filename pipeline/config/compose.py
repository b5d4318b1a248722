"""From the YAML that Hydra composed to a validated :class:`pipeline.config.schema.Config`.  Nothing else reads YAML."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from passes.errors import UserError, message_line
from pipeline.config import lengths
from pipeline.config.checks import check
from pipeline.config.schema import BenchmarkShape, Config

Describe = Callable[[str, str | None], dict[str, Any]]


def from_hydra(composed: DictConfig, describe: Describe | None = None) -> Config:
    """The composed Hydra config as a validated :class:`Config`; raises :class:`UserError`.

    ``describe`` gives the config.json of a repository of the hub at a revision: the architecture of a model of which
    the settings name nothing else.
    """
    plain = OmegaConf.create(
        {k: v for k, v in OmegaConf.to_container(composed, resolve=False).items() if k != "hydra"}  # type: ignore[union-attr]
    )
    if describe is not None:
        _describe(plain, describe)
    notes = lengths.settle(plain)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_refusal(error, plain)) from None
    assert isinstance(config, Config)
    config = replace(_at_home(config), notes=notes)
    check(config)
    return config


def _describe(plain: DictConfig, describe: Describe) -> None:
    """Give a repository's model its architecture, and its name where it has none of its own."""
    model = plain.get("model")
    if not isinstance(model, DictConfig) or model.get("path") is not None or model.get("architecture") != {}:
        return
    if OmegaConf.is_missing(model, "source"):
        raise UserError("model.source=???: name a repository of the hub, model=ORG/NAME")
    source = str(model.get("source") or "pypi:")
    if not source.startswith("pypi:"):
        model.architecture = describe(source, model.get("revision"))
        if model.get("name") == "hub":
            model.name = source.rpartition("/")[2]


def _at_home(config: Config) -> Config:
    """``config`` with ``~`` in its paths as the shell expands it, where that stood in front of a ``/`` or a name."""
    calibration = config.quantize.calibration
    text = _expanded("quantize.calibration.text", calibration.text)
    return replace(
        config,
        model=replace(config.model, path=_expanded("model.path", config.model.path)),
        backend=replace(
            config.backend, plugin_library=_expanded("backend.plugin_library", config.backend.plugin_library)
        ),
        verify=replace(config.verify, text=_expanded("verify.text", config.verify.text)),
        quantize=replace(config.quantize, calibration=replace(calibration, text=text)),
        tracking=replace(config.tracking, uri=_expanded("tracking.uri", config.tracking.uri) or ""),
        store=replace(config.store, folder=_expanded("store.folder", config.store.folder)),
        output=_expanded("output", config.output) or "",
    )


def _expanded(key: str, value: str | None) -> str | None:
    # Of a relative SQLite address the path begins behind three slashes.
    found = re.fullmatch(r"(sqlite:///)?(~.*)", value, re.DOTALL) if value is not None else None
    if value is None or found is None:
        return value
    try:
        return (found[1] or "") + str(Path(found[2]).expanduser())
    except RuntimeError:
        user = found[2].partition("/")[0]
        raise UserError(f"{key}={value}: there is no user {user[1:]}; write ./{found[2]} for a name with ~") from None


def _refusal(error: OmegaConfBaseException, plain: DictConfig) -> str:
    """One line for what does not fit the schema: key, value and what is allowed."""
    key: str = str(error.full_key)
    owner: Any = error.object_type
    if isinstance(error, MissingMandatoryValue):
        return f"{key}=???: has no default; set it, for example {key}=VALUE"
    value: Any = OmegaConf.to_container(plain, resolve=False)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if owner is BenchmarkShape:  # the one that stands in a list, where OmegaConf loses the way
        key, value = f"benchmark.shapes.{key}", "..."
    setting = f"{key}={value if error.value is None else error.value}"
    if isinstance(error, ConfigKeyError):
        return f"{setting}: no such setting; allowed here: {', '.join(sorted(f.name for f in fields(owner)))}"
    hint = get_type_hints(owner).get(error.key) if is_dataclass(owner) else None
    kinds = [_kind(t) for t in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    if isinstance(error, ValidationError) and all(kinds):
        return f"{setting}: must be {' or '.join(map(str, kinds))}"
    return f"{setting}: {message_line(error.msg or error)}"


def _kind(hint: Any) -> str | None:
    if is_dataclass(hint):
        return f"a mapping, {{{', '.join(f'{each.name}: …' for each in fields(hint))}}}"
    return _KINDS.get(get_origin(hint) or hint)


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, [a, b]",
    dict: "a mapping, {a: 1}",
    NoneType: "null",
}
