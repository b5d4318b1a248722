"""An engine on disk: its bytes, and the manifest beside them that says what it is and where it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from passes.errors import UserError
from passes.tensorrt.versions import load_stack
from pipeline.engine.sections import Engine
from pipeline.host.files import draft, write_text
from pipeline.trace.call_form import InputSpec

if TYPE_CHECKING:
    from pipeline.trace.cache_shape import CacheShape


def write_engine(
    folder: Path,
    data: Any,
    engine: Engine,
    inputs: tuple[InputSpec, ...],
    environment: dict[str, Any],
    assumed: Collection[str] = (),
    guarded: bool = True,
    cache: CacheShape | None = None,
    read: Collection[str] | None = None,
) -> None:
    """The engine's file, ``engine.trt`` or ``decode.trt``, and beside it its manifest (``.json``): hash, inputs with
    their ranges, KV cache, target and versions, the conditions under which masks were dropped, and whether
    :func:`pipeline.engine.runner.open_engine` has them checked.  ``read``: the inputs that the engine has, where it is
    not all of them."""
    assert engine.file is not None
    with draft(folder / engine.file) as part:
        part.write_bytes(data)
    manifest = {
        "schema": 1,
        "file": engine.file,
        "bytes": engine.bytes,
        "sha256": engine.sha256,
        "target": engine.target,
        "inputs": [
            asdict(spec) | {"shape": spec.sizes or ["batch", "length"], "read": read is None or spec.name in read}
            for spec in inputs
        ],
        "cache": None if cache is None else asdict(cache) | {"dtype": str(cache.dtype).removeprefix("torch.")},
        "outputs": [{"name": "output0", "shape": ["batch", "1 or length", "vocabulary"]}],
        "assumed": list(assumed),
        "guard": guarded,
        "environment": environment,
    }
    write_text((folder / engine.file).with_suffix(".json"), json.dumps(manifest, indent=2) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest beside the engine file ``path``; raises :class:`UserError` where there is none."""
    with _there(path):
        manifest: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return manifest


@contextmanager
def _there(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        beside = path.with_suffix(".json").name
        raise UserError(f"{error.filename}: not there; an engine is {path.name} with {beside} beside it") from None


def read_engine(path: Path) -> tuple[dict[str, Any], bytes]:
    """The manifest beside the engine file ``path``, and its bytes; raises :class:`UserError` if its hash is another."""
    manifest = read_manifest(path)
    with _there(path):
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise UserError(f"{path.name}: its sha256 is not the manifest's; the file was changed or cut off")
    return manifest, data


def check_target(path: Path, manifest: dict[str, Any]) -> None:
    """Raises :class:`UserError` where the engine cannot run here: it is of another TensorRT, or for another GPU."""
    made, here = manifest["environment"], load_stack().versions()
    if any(made.get(key) != here[key] for key in ("flavour", "tensorrt")):
        raise UserError(
            f"{path.name}: was built by {made.get('flavour')} {made.get('tensorrt')}, and this is {here['flavour']} "
            f"{here['tensorrt']}; build it again"
        )
    if not torch.cuda.is_available():
        raise UserError(f"{path.name}: running an engine needs an NVIDIA GPU, and there is none")
    gpu = torch.cuda.get_device_name()
    if made.get("gpu") not in (None, gpu):  # None: built ahead of time, for several
        raise UserError(f"{path.name}: was built for {made['gpu']}, and this is {gpu}; build it again")
