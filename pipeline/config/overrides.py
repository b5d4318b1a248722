"""What was typed, as Hydra's grammar takes it, and back again for messages.

Settings of the schema need no ``++``.  A setting that is free text, such as a path, is taken as the shell hands it
over, blanks, brackets, ``=``, quotes and all; with ``-m`` its commas separate values, and quotes within the shell's,
``"model.path='a,b'"``, keep one that has a comma.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from passes.errors import UserError
from pipeline.config.keys import schema_keys

FREE_TEXT = (
    "model.name", "model.path", "model.revision", "model.source", "output", "store.folder", "backend.plugin_library",
    "quantize.calibration.text", "sweep.baseline", "tracking.experiment", "tracking.uri", "verify.text",
)  # fmt: skip
"""Settings whose values Hydra's grammar would cut up, convert or refuse."""

ONE_VALUE = ("sweep.baseline",)
"""Of those, what all jobs of a sweep have in common and has commas of its own."""

SWEEPS = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
"""Hydra's ways to write several values."""


REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""What the Hugging Face hub calls a model: ORG/NAME."""


def model_by_name(argument: str, several: bool, known: Callable[[str], bool]) -> list[str]:
    """``model=ORG/NAME``, a repository of the hub, and ``model=PATH``, a folder or GGUF file that is there, written out
    as the settings that they stand for; anything else as it is.

    ``known``: whether conf/ has a model of that name, which comes first; then comes what is here, then the hub.
    """
    key, _, value = argument.partition("=")
    if key != "model":
        return [argument]
    values = [unquoted(each) for each in (split(value) if several else [value])]

    def kind(each: str) -> str | None:
        if known(each) or not each:
            return None
        path = Path(each).expanduser() if each[:2] in ("~", "~/") else Path(each)
        if path.is_dir() or path.suffix == ".gguf":
            return "local"
        return "hub" if REPOSITORY.fullmatch(each) else None

    kinds = {kind(each) for each in values}
    if kinds == {None}:
        return [argument]
    if len(kinds) > 1:
        raise UserError(
            f"{argument}: a sweep is over models of conf/, or repositories of the hub, or folders; make one of each"
        )
    setting = {"local": "model.path", "hub": "model.source"}[str(*kinds)]
    return [f"model={str(*kinds)}", f"{setting}={value}"]


def for_hydra(argument: str, several: bool) -> str:
    """One argument of the command line as Hydra shall read it; ``several``: commas separate the values of a sweep."""
    key, equals, value = argument.partition("=")
    group, dot, name = key.rpartition(".")
    if equals and key.lstrip("+") in FREE_TEXT:
        values = split(value) if several and key not in ONE_VALUE else [value]
        value = ",".join(_literal(each, several) for each in values)
    admitted = "++" if equals and dot and name in schema_keys(group) else ""  # also where the YAML leaves it out
    return f"{admitted}{key}{equals}{value}"


def _literal(value: str, several: bool) -> str:
    if value in ("", "null", "???") or _is_quoted(value) or (several and SWEEPS.fullmatch(value)):
        return value
    return quoted(value)


def _is_quoted(value: str) -> bool:
    """Whether ``value`` is one string in quotes already."""
    return re.fullmatch(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""", value, re.DOTALL) is not None


def quoted(value: str) -> str:
    """``value`` as a string of Hydra's grammar, in which a backslash is one unless a quote follows it."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda run: 2 * run[1] + ("\\'" if run[2] else ""), value) + "'"


def unquoted(value: str) -> str:
    """``value`` without the quotes around it, if it has any."""
    if not _is_quoted(value):
        return value
    quote = value[0]
    return re.sub(rf"(\\+)({quote}|\Z)", lambda run: "\\" * (len(run[1]) // 2) + run[2], value[1:-1])


def typed(override: str) -> str:
    """An override that Hydra was given, in the words of the person who typed it."""
    key, equals, value = override.lstrip("+").partition("=")
    return f"{key}{equals}{unquoted(value) if key in FREE_TEXT else value}"


def split(text: str) -> list[str]:
    """``text`` at its commas, blanks around them dropped; those within quotes or brackets separate nothing."""
    parts, open_, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not parts[-1].strip():  # as the first letter: a person's quote, no apostrophe
            quote = letter
        elif letter in "([{":
            open_ += 1
        elif letter in ")]}":
            open_ -= 1
        elif letter == "," and not open_:
            parts.append("")
            continue
        parts[-1] += letter
    # A bracket that has no partner is part of a name.
    return [part.strip() for part in (parts if open_ == 0 and not quote else text.split(","))]


def read(overrides: Iterable[str]) -> list[Override]:
    """Hydra's reading of its own grammar; raises :class:`UserError` for what it cannot read."""
    try:
        found = OverridesParser.create().parse_overrides(list(overrides))
        nameless = next((each.input_line for each in found if not each.key_or_group), None)
    except OverrideParseException as error:
        found, nameless = [], error.override
    if nameless is not None:
        raise UserError(
            f"{typed(str(nameless))}: cannot be read; settings are written key=value, lists and mappings in "
            f"quotes: 'key=[a, b]', 'key={{a: 1}}'"
        )
    return found


def combinations(overrides: Iterable[Override]) -> list[list[str]]:
    """The jobs of a sweep, as Hydra's own sweeper has them: every choice of one value for each key, the last one's
    changing fastest; raises :class:`UserError` for what is no list of values."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            kind = override.value_type.name if override.value_type is not None else "it"
            raise UserError(f"-m: {typed(str(override.input_line))}: {kind} is no list of values; a search takes it")
    return [list(job) for job in product(*values.values())]


def explained(error: Exception, overrides: list[str], conf: Path) -> str:
    """What Hydra says in several lines, with the override that it is about; ``conf`` has the groups."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if f"'{key}/{value}'" in lines[0]:  # Could not find 'strategy/foo'
            options = sorted(path.stem for path in (conf / key).glob("*.yaml"))
            return f"{typed(override)}: allowed are {', '.join(options) or 'files of your own, with --config-dir DIR'}"
        if f"'{key}'" in lines[0]:  # Could not override 'foo'
            allowed = schema_keys(key.rpartition(".")[0])
            remedy = f"allowed here: {', '.join(allowed)}" if allowed else f"+{typed(override)} would add it"
            return f"{typed(override)}: no such setting; {remedy}"
    return f"{' '.join(map(typed, overrides)) or '--config-name'}: {' '.join(lines)}"
