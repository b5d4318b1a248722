"""The engine store: a folder a finished engine, named by its content key, in the user's cache.

An entry appears whole or not at all, carries the sha256 of each of its files, and is used only while all of them
match.  One process builds an engine while the others that want it wait; a lock goes with the process that holds it,
so nothing is left behind by one that was killed.  Above its size limit the store drops what was not used for longest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passes.errors import UserError
from pipeline.config.schema import StoreConfig
from pipeline.host.files import bytes_in, locked, sha256_of, share
from pipeline.model.gguf import cache_folder, locked_entry
from pipeline.record.report import sha256_of_json

CONTENT = "stored.json"
PARTIAL = ".partial"


class Damaged(Exception):
    """An entry whose files are not the ones that were stored; the message says which."""


def root_of(config: StoreConfig) -> Path:
    """The folder of the store that ``config`` names, which need not be there."""
    return Path(config.folder) if config.folder is not None else cache_folder() / "engines"


@dataclass(frozen=True)
class Store:
    root: Path
    limit_bytes: float

    @classmethod
    def of(cls, config: StoreConfig) -> Store:
        """The store that ``config`` names, its folder made; raises :class:`UserError` where none can be written."""
        root = root_of(config)
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not os.access(root, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UserError(
                f"store.folder={root}: cannot be written ({error.strerror}); name another, or set store.enabled=false"
            ) from None
        return cls(root.resolve(), config.limit_gib * 2**30)

    def entry(self, key: str) -> Path:
        return self.root / key

    def locked(self, key: str, waiting: Callable[[str], None]) -> AbstractContextManager[None]:
        """Hold ``key`` among processes; ``waiting`` is told once if another holds it."""
        return locked_entry(self.entry(key), waiting)

    def content(self, key: str) -> dict[str, Any] | None:
        """What was stored beside the files of ``key``; None without an entry.  Raises :class:`Damaged`."""
        folder = self.entry(key)
        if not folder.is_dir():
            return None
        try:
            stored = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
            content: dict[str, Any] = stored["content"]
            whole = stored["sha256"] == sha256_of_json(content)
        except (OSError, ValueError, KeyError, TypeError):
            raise Damaged(f"{CONTENT} cannot be read") from None
        if not whole:
            raise Damaged(f"{CONTENT} was changed")
        return content

    def restore(self, key: str, sums: dict[str, str], into: Path) -> None:
        """Have the files of ``key``, name -> sha256, in ``into``; raises :class:`Damaged` or, of a full disk,
        :class:`OSError`, and then leaves none there.

        On one file system the engine is the same file (:func:`pipeline.host.files.share`): removing the run's folder
        leaves the store's, and whoever writes into one writes into both, which the hash brings to light.
        """
        copies = {name: into / name for name in sums}
        try:
            for name, copy in copies.items():
                try:
                    share(self.entry(key) / name, copy)
                except FileNotFoundError:
                    raise Damaged(f"{name} is missing") from None
                if sha256_of(copy) != sums[name]:
                    raise Damaged(f"{name} was changed")
        except (Damaged, OSError):
            for copy in copies.values():
                copy.unlink(missing_ok=True)
            raise
        os.utime(self.entry(key) / CONTENT)  # when it was last used

    def commit(self, key: str, files: Iterable[Path], content: dict[str, Any]) -> None:
        """Make ``files`` and ``content`` the entry of ``key``, which must be locked; then keep to the size limit.

        Raises :class:`OSError` where that cannot be written, or is by itself above the limit.
        """
        files = list(files)
        if (size := sum(file.stat().st_size for file in files)) > self.limit_bytes:
            raise OSError(f"{size / 2**30:.2g} GiB is above store.limit_gib={self.limit_bytes / 2**30:g}")
        partial = self.root / f"{key}{PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            partial.mkdir()
            for file in files:
                share(file, partial / file.name)
            content = {**content, "files": {file.name: sha256_of(partial / file.name) for file in files}}
            text = json.dumps({"sha256": sha256_of_json(content), "content": content}, indent=1)
            (partial / CONTENT).write_text(text, encoding="utf-8")
            self.remove(key)
            partial.replace(self.entry(key))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._evict(key)

    def remove(self, key: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self.entry(key))

    def _evict(self, kept: str) -> None:
        """Down to the limit, least recently used first; ``kept`` and what other processes hold stays."""
        folders = sorted((path for path in self.root.iterdir() if path.is_dir()), key=_last_used)
        sizes = {folder: bytes_in(folder) for folder in folders}
        excess = sum(sizes.values()) - self.limit_bytes
        for folder in folders:
            if folder.name == kept or (excess <= 0 and folder.suffix != PARTIAL):
                continue
            with suppress(TimeoutError), locked(folder.with_suffix(".lock"), timeout_s=0):
                shutil.rmtree(folder, ignore_errors=True)
                excess -= sizes[folder]


def _last_used(folder: Path) -> float:
    """0 for what is no whole entry: left by a process that was killed, it goes first."""
    with suppress(FileNotFoundError):
        return (folder / CONTENT).stat().st_mtime if folder.suffix != PARTIAL else 0.0
    return 0.0
