"""What makes two jobs the same, and what makes a finished one stand for the next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.config.idle import idle
from pipeline.config.schema import Config
from pipeline.model import checkpoint
from pipeline.record.environment import environment
from pipeline.record.own_code import code_hash
from pipeline.record.report import sha256_of_json

NOT_SETTINGS = ("output", "tracking", "store", "sweep", "rerun", "dry_run")
"""Where a job's results go and how it is run: they do not change what comes out."""

NOT_MEASURING = ("__main__", "start", "tracking", "sweep", "compare")
"""What in ``pipeline`` starts runs, keeps and compares what others measured."""


def settings_key(config: Config) -> str:
    """The same for two jobs that ask for the same, wherever and with whatever versions they run; what has no part in
    a job does not tell it from another."""
    settings = {key: value for key, value in config.to_dict().items() if key not in NOT_SETTINGS}
    for name in idle(config):
        *groups, last = name.split(".")
        owner = settings
        for group in groups:
            owner = owner[group]
        owner[last] = None
    return sha256_of_json(settings)


class Commits(dict[tuple[str | None, str | None], str | None]):
    """Which commit a repository's revision stands for, asked once for each: a branch moves, and all jobs of a sweep are
    about the same weights."""

    def __missing__(self, which: tuple[str, str | None]) -> str | None:
        self[which] = checkpoint.commit(*which)
        return self[which]


def pinned(config: Config, commits: Commits) -> Config:
    """``config`` with the commit of its weights in the place of a branch or tag; as it is where that is not known."""
    model = config.model
    commit = commits[model.source, model.revision] if checkpoint.on_hub(model) else None
    return config if commit is None else replace(config, model=replace(model, revision=commit))


def content_key(config: Config, surroundings: str, commits: Commits) -> str:
    """The same for two jobs that would come to the same: settings, weights (the hub's by their commit), and
    :func:`surroundings`.  A folder's weights go by name, size and time: hashing them takes as long as loading them."""
    files: list[tuple[str, int, int]] = []
    if config.model.path is not None:
        where = Path(config.model.path).resolve()
        inside = sorted(where.iterdir()) if where.is_dir() else [where]
        found = ((path, path.stat()) for path in inside if path.is_file())
        files = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]
    return sha256_of_json([settings_key(pinned(config, commits)), files, surroundings])


def surroundings() -> str:
    """What stands around every job of this machine: our own code, the libraries' versions, and the GPU."""
    described = asdict(replace(environment(), git=None, code=None))  # another commit may be the same code
    return sha256_of_json([described, code_hash(beside=NOT_MEASURING)])


def sweep_key(jobs: Iterable[str]) -> str:
    """The same for two sweeps over the same jobs, in whatever order."""
    return sha256_of_json(sorted(jobs))
