"""GGUF files as safetensors folders in the user's cache.

transformers reads a GGUF file in pure Python (over half a minute for 135 M parameters); the result is kept, so that
the next start takes a second.  A kept folder appears whole or not at all, carries the sha256 of each of
its files, and is made anew when one of them no longer matches.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from passes.errors import UserError, message_line
from pipeline.host import gguf_header
from pipeline.host.files import locked, sha256_of

Progress = Callable[[str], None]

_MANIFEST = "manifest.json"
_FORMAT = 1  # raise it when the contents of a kept folder change


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings, which would break the run's own display."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/proved-attention``, ``~/.cache`` where that is not set (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proved-attention"


def blocks(file: Path) -> str:
    """The types of a GGUF file's tensors that are stored in blocks; empty where all of them are plain numbers."""
    from gguf import GGMLQuantizationType

    types = {GGMLQuantizationType(tensor.type).name for tensor in gguf_header.read(file).tensors.values()}
    return ", ".join(sorted(types - {"F64", "F32", "F16", "BF16"}))


def dequantised(file: str, blocks: str) -> str:
    """What the reader of the report must know of a GGUF file's weights, stored as ``blocks``."""
    return f"{file} stores its weights as {blocks}: they were dequantised, and the engine holds none of these blocks"


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder in the cache: on the same file system, so that a finished folder can be moved."""
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".partial-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def kept(
    sha256: str,
    config: dict[str, Any],
    source: Callable[[], AbstractContextManager[Path]],
    progress: Progress,
    *,
    origin: str,
    remedy: str = "",
    tokenizer: bool = True,
) -> Path:
    """The safetensors folder of the GGUF file with this sha256, made from ``source()`` where it is missing.

    ``config`` is the ``transformers`` config: GGUF metadata is not a whole one (it has no llama3 rope
    scaling, and a float32 epsilon).  ``source`` is a context manager that gives the file's path; it is
    entered only when the file is needed.  ``tokenizer``: keep the file's tokenizer too.
    ``origin`` is the setting that named the file, for error messages; ``remedy`` ends the one of a wrong sum.
    Two processes that want the same folder wait for each other.
    """
    key = hashlib.sha256(json.dumps([_FORMAT, sha256, config, tokenizer], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"gguf-{sha256[:16]}-{key}"
    try:
        with locked_entry(folder, progress):
            if folder.exists():
                if _intact(folder):
                    return folder
                progress(f"{folder} is damaged and is made again")
            with source() as gguf, scratch() as work:
                if sha256_of(gguf) != sha256:
                    raise UserError(f"{origin}: sha256 of {gguf} is not {sha256}, so it is not used{remedy}")
                new = work / "new"
                _convert(gguf, config, new, progress, origin=origin, tokenizer=tokenizer)
                _write_manifest(new)
                if folder.exists():
                    shutil.rmtree(folder)
                new.replace(folder)
    except OSError as error:
        if error.filename is None:  # not the file system's
            raise
        raise UserError(
            f"XDG_CACHE_HOME={cache_folder().parent}: {error.strerror}: {error.filename}; name a folder to write in"
        ) from None
    return folder


def locked_entry(folder: Path, progress: Progress) -> AbstractContextManager[None]:
    """Hold the lock of ``folder``, which need not exist, among processes."""
    waits = f"waiting for another process that prepares {folder}"
    return locked(folder.with_suffix(".lock"), waiting=lambda: progress(waits))


def _write_manifest(folder: Path) -> None:
    sums = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(sums, indent=1))


def _intact(folder: Path) -> bool:
    """Whether every file is as it was written; hashing all of SmolLM2 takes 0.5 s."""
    try:
        sums = json.loads((folder / _MANIFEST).read_text())
        return bool(sums) and all(sha256_of(folder / name) == known for name, known in sums.items())
    except (OSError, ValueError):
        return False


def _convert(
    gguf: Path, config: dict[str, Any], folder: Path, progress: Progress, *, origin: str, tokenizer: bool
) -> None:
    """Write the GGUF file's weights, dequantised to float32, and its tokenizer if wanted as a Hugging Face folder."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    hf_config = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    progress(f"reading {gguf.name} (once; kept in {folder.parent.parent})")
    try:
        # The GGUF reader draws a bar that cannot be switched off.
        with quiet(), redirect_stderr(io.StringIO()):
            # dequantize: transformers would otherwise keep the blocks packed where it finds a kernel for them.
            model, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                config=hf_config,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **where,
            )
            reader = AutoTokenizer.from_pretrained(gguf.parent, **where) if tokenizer else None
    except Exception as error:  # the parsers raise whatever a strange file makes them trip over
        raise UserError(f"{origin}: transformers cannot read {gguf} ({message_line(error)})") from None
    if info["missing_keys"]:
        raise UserError(
            f"{origin}: {gguf} lacks weights that its config asks for, {sorted(info['missing_keys'])[0]} first"
        )
    # The loaded model is marked as quantised and refuses to be saved; a plain one takes its tensors.
    with quiet(), torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    with quiet():
        plain.save_pretrained(folder)
        if reader is not None:
            reader.save_pretrained(folder)
