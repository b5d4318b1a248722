"""The content key of an engine: sha256 over everything that decides it, and nothing else.

Two runs with one key would build the same engine and judge it by the same code.  What only decides how the engine is
measured, compared or recorded (``verify``, ``benchmark``, ``tracking``, ``output``, ``until``, ``cuda_graph``) is left
out, and so is where the weights lie: a checkpoint is named by its sha256, and by the config that the model was made
from, which is no part of the weights' file.

What became of each mask needs no line of its own.  A claim is given up after so many of z3's own steps and not after so
many seconds (``passes.proof.symbolic.SOLVER_STEPS``), so the outcome of a proof follows from the architecture, the
profile, the code and the versions of torch and z3, on every machine, and those are here.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

from passes.precision import FEW_BITS
from pipeline.config.quantize import idle_of_quantize
from pipeline.config.schema import Config
from pipeline.host.files import sha256_of
from pipeline.record.own_code import code_hash
from pipeline.record.report import sha256_of_json

if TYPE_CHECKING:
    import torch

    from passes.tensorrt.versions import Stack
    from pipeline.model.load import LoadedModel

_MODEL_IDENTITY = ("_name_or_path", "name_or_path", "transformers_version")
"""Keys of a ``transformers`` config that say where it was read and by what, not what it is."""


def engine_key(ingredients: dict[str, Any]) -> str:
    """sha256, in hex, of the canonical JSON of :func:`ingredients`."""
    return sha256_of_json(ingredients)


def ingredients(config: Config, loaded: LoadedModel, stack: Stack, device: torch.device) -> dict[str, Any]:
    """What decides the engine of ``config``, as plain JSON."""
    import transformers
    import z3

    return {
        "architecture": _architecture(loaded),
        # Random weights differ between CPU and GPU, see pipeline.model.load; torch's version is below.
        "weights": loaded.sha256 or {"seed": config.seed, "device": device.type},
        "inputs": config.model.inputs,
        "logits": config.model.logits,
        "precision": config.precision,
        "quantize": _quantize(config),
        "strategy": asdict(config.strategy),
        "shape": asdict(config.shape),
        "cache": _cache(config),
        "backend": {key: value for key, value in asdict(config.backend).items() if key != "cuda_graph"},
        "versions": {**stack.versions(), "transformers": transformers.__version__, "z3": z3.get_version_string()},
        "target": target(device),
        "code": code_hash(),
    }


def _quantize(config: Config) -> dict[str, Any] | None:
    """What decides the weights of few bits: no setting without a part, and of a text its contents."""
    few, asked = FEW_BITS.get(config.precision), config.quantize
    if few is None:
        return None
    found = asdict(asked) | {"base": config.number_type, "method": asked.method or few.methods[0]}
    found |= {"prompt": config.holds_small("engine"), "step": config.holds_small("decode")}
    calibration = found.pop("calibration")
    for key in idle_of_quantize(config.precision, asked, config.cache.name != "none"):
        found.pop(key.removeprefix("quantize."), None)
    if few.calibrated(asked.method):
        text, seed = asked.calibration.text, asked.calibration.seed
        read = sha256_of(Path(text)) if text else f"docstrings of Python {python_version()}"
        calibration |= {"text": read, "seed": config.seed if seed is None else seed}
        found["calibration"] = calibration
    if found.get("method") == "awq":
        found["modelopt"] = version("nvidia-modelopt") if find_spec("modelopt") else None
    return found


def target(device: torch.device) -> str:
    """The GPU that an engine is built for, or ``ahead of time``: TensorRT-RTX's own choice of targets."""
    import torch

    if device.type != "cuda":
        return "ahead of time"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def _architecture(loaded: LoadedModel) -> dict[str, Any]:
    described = json.loads(loaded.model.config.to_json_string(use_diff=False))
    return {key: value for key, value in described.items() if key not in _MODEL_IDENTITY}


def _cache(config: Config) -> dict[str, Any]:
    """A capacity that is left open is chosen from the generation that is asked for, which then counts too."""
    cache, generate = asdict(config.cache), config.benchmark.generate
    if config.cache.name != "none" and config.cache.capacity is None and generate is not None:
        cache["generate"] = asdict(generate)
    return cache
