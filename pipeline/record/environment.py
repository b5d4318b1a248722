"""What a run ran on: the report's ``environment`` section.

Versions come from package metadata, so that asking costs no heavy import; the GPU is asked through NVML.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipeline.host import gpu
from pipeline.record.own_code import BESIDE_A_FIGURE, code_hash

FLAVOURS = {"tensorrt_rtx": "torch-tensorrt-rtx", "tensorrt": "torch-tensorrt"}
"""Import name of the TensorRT flavour -> distribution of Torch-TensorRT built for it."""

RTX_CAPABILITIES = frozenset({"7.5", "8.0", "8.6", "8.9"})
"""Besides all of 12.x.  Source: support matrix of TensorRT for RTX (Turing, Ampere, Ada and Blackwell)."""

TENSORRT_CAPABILITY = (7, 5)
"""The oldest that TensorRT supports.  Source: TensorRT support matrix (10.x and 11.x)."""


@dataclass(frozen=True)
class Environment:
    """What a run ran on; what is not there or cannot be known is null."""

    gpu: str | None
    compute_capability: str | None
    supported_by_vendor: bool | None
    """Whether the vendor of TensorRT lists this GPU."""
    driver: str | None
    torch: str | None
    torch_tensorrt: str | None
    tensorrt: str | None
    flavour: str | None
    """``tensorrt_rtx`` or ``tensorrt``."""
    transformers: str | None
    python: str
    git: str | None
    """Commit of the checkout that this code is, "-dirty" behind it when tracked files differ."""
    code: str | None
    """sha256 over the modules of ours that make, judge and time engines (``pipeline.record.own_code``): figures of one
    hash are of one code, whatever else the commits between them changed."""


def environment(tensorrt: Mapping[str, str | None] | None = None) -> Environment:
    """What is here.

    ``tensorrt`` is what the caller knows of {torch_tensorrt, tensorrt, flavour} from the modules it has
    loaded; it wins over what the package metadata says.
    """
    card = gpu.card()
    versions = {**_installed_tensorrt(), **(tensorrt or {})}
    return Environment(
        gpu=card.name,
        compute_capability=card.compute_capability,
        supported_by_vendor=supported_by_vendor(versions["flavour"], card.compute_capability),
        driver=card.driver,
        torch=_distribution_version("torch"),
        torch_tensorrt=versions["torch_tensorrt"],
        tensorrt=versions["tensorrt"],
        flavour=versions["flavour"],
        transformers=_distribution_version("transformers"),
        python=platform.python_version(),
        git=git_commit(Path(__file__).resolve()),
        code=code_hash(beside=BESIDE_A_FIGURE),
    )


def supported_by_vendor(flavour: str | None, compute_capability: str | None) -> bool | None:
    """Whether the vendor lists ``compute_capability`` ("9.0") for ``flavour``; None where either is unknown."""
    if flavour is None or compute_capability is None:
        return None
    major, minor = (int(part) for part in compute_capability.split("."))
    if flavour == "tensorrt_rtx":
        return major == 12 or compute_capability in RTX_CAPABILITIES
    return (major, minor) >= TENSORRT_CAPABILITY


def git_commit(file: Path) -> str | None:
    """Commit of the checkout that tracks ``file``, "-dirty" behind it when tracked files differ from it.

    None when no checkout tracks the file (an installed package, even one in a virtual environment inside
    a repository of the user's), and where git is missing.  The current folder and GIT_DIR play no part.
    """
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(file: Path, *arguments: str) -> str | None:
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, env=surroundings, timeout=30
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_tensorrt() -> dict[str, str | None]:
    for flavour, distribution in FLAVOURS.items():
        torch_tensorrt = _distribution_version(distribution)
        if torch_tensorrt is not None:
            return {
                "torch_tensorrt": torch_tensorrt,
                "tensorrt": _distribution_version(flavour) or module_version(flavour),
                "flavour": flavour,
            }
    return {"torch_tensorrt": None, "tensorrt": None, "flavour": None}


def _distribution_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def module_version(name: str) -> str | None:
    """``__version__`` of a module that may come without metadata (an unpacked tree); None where there is none."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        return None
    version = getattr(importlib.import_module(name), "__version__", None)
    return None if version is None else str(version)
