"""What a logged model says of itself: which run and engine it stands for, where that runs, and how it answers."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passes.errors import UserError
from pipeline.config.schema import Config
from pipeline.deploy.request import Settings
from pipeline.host.files import write_text
from pipeline.host.plain_json import from_json, to_json
from pipeline.model.sections import Model
from pipeline.record.environment import Environment

SCHEMA = 1
FILE = "model.json"
TOKENIZER = "tokenizer"
"""Folder beside it."""


@dataclass(frozen=True)
class EngineFile:
    """An engine of the run, which is not copied: it is known by its hash."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Described:
    """``verified``: what ran when it was verified, ``engine`` or ``graph``."""

    schema: int
    verified: str
    model: Model
    config: dict[str, Any]
    """Every setting of the run."""
    engines: tuple[EngineFile, ...]
    built_for: str
    """The GPU, or those that it was built for ahead of time."""
    environment: Environment
    """What it was built on."""
    mlflow: str
    graphs: dict[str, str]
    """Program -> :func:`graph_hash` of what its engine was built from."""
    settings: Settings

    @property
    def run_config(self) -> Config:
        return from_json(Config, self.config)


def write(folder: Path, described: Described) -> None:
    write_text(folder / FILE, json.dumps(to_json(described), indent=2) + "\n")


def read(folder: Path) -> Described:
    """Raises :class:`UserError` for what is none, or is of another form."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise UserError(
                f"{FILE}: is of form {content['schema']}, and this code reads {SCHEMA}; log the model again"
            )
        return from_json(Described, content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: holds no {FILE} that can be read; log the model again") from None


def graph_hash(graph: str) -> str:
    """Of a graph's text, sha256 without the names of devices: a graph is the same wherever it was traced."""
    return hashlib.sha256(
        re.sub(r"device: [\w:]+|device\(type='\w+'(, index=\d+)?\)", "device", graph).encode()
    ).hexdigest()
