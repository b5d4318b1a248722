"""Real text to measure a model on: a file of the user's, or what every machine with a Python has."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes.errors import UserError

if TYPE_CHECKING:
    from pipeline.model.load import LoadedModel

DOCSTRINGS = "docstrings of Python's standard library"
LETTERS = 300_000
"""Of these docstrings: some 70,000 tokens of the usual tokenizers."""
LETTERS_OF_FILE = 2_000_000
"""Of a file, from its beginning: many times what is needed, and no minute of tokenizing."""


@dataclass(frozen=True)
class RealText:
    """A text in a model's tokens."""

    source: str
    """The file, or :data:`DOCSTRINGS`."""
    sha256: str
    """Of the UTF-8 of what was read of it.  Another Python has other docstrings."""
    tokens: Tensor
    """[n] int64 on the CPU, without any special token."""
    begin: int | None
    """The token that this tokenizer puts in front of a text, where it puts one."""


def real_text(
    path: str | None, loaded: LoadedModel, least: int, setting: str = "verify.text", behind: int = 0
) -> RealText:
    """The text in the file ``path``, or the docstrings of the standard library behind the first ``behind`` letters of
    them, in the tokens of ``loaded``, which has a tokenizer.  Raises :class:`UserError` naming ``setting`` for a file
    that cannot be read, holds fewer than ``least`` tokens, or has tokens that the model does not know."""
    assert loaded.tokenizer is not None
    text = _docstrings(behind) if path is None else _read(path, setting)
    encoded = loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    tokens = torch.tensor(encoded, dtype=torch.int64)
    where = f"{setting}={'null' if path is None else path}"
    if len(tokens) < least:
        raise UserError(f"{where}: holds {len(tokens)} tokens of this model's, at least {least} are needed")
    vocabulary = loaded.model.config.get_text_config().vocab_size
    if int(tokens.max()) >= vocabulary:
        raise UserError(
            f"{where}: the tokenizer gives token {int(tokens.max())}, the model has vocab_size={vocabulary}"
        )
    begin = loaded.tokenizer.bos_token_id
    puts_one = begin is not None and loaded.tokenizer("a").input_ids[0] == begin
    source = DOCSTRINGS if path is None else str(Path(path).resolve())
    return RealText(source, hashlib.sha256(text.encode()).hexdigest(), tokens, begin if puts_one else None)


def _read(path: str, setting: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(LETTERS_OF_FILE)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"{setting}={path}: cannot be read ({reason}); name a text file") from None


def _docstrings(behind: int = 0) -> str:
    """Those of the modules at the top of the standard library, in the order of their names, :data:`LETTERS` of them."""
    found: list[str] = []
    letters = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        for docstring in _docstrings_of(path):
            found.append(docstring)
            letters += len(docstring) + 2
        if letters >= behind + LETTERS:
            break
    return "\n\n".join(found)[behind : behind + LETTERS]


def _docstrings_of(path: Path) -> Iterator[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            yield docstring
