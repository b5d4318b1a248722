"""``python -m pipeline.kept``: what all the engines on this machine take, and a limit for all of them.

Nothing goes unless ``--limit-gib`` asks for it; then those go that were not used for longest, in whatever folders they
are, and never those that an alias of the model registry points to.  Exit code 2: something asked for cannot be done.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path

from passes.errors import UserError
from pipeline.config.schema import StoreConfig
from pipeline.host.arguments import Parser
from pipeline.kept.engines import Kept, excess, found, remove
from pipeline.store.entries import root_of

GIB = 2**30


def _parser() -> Parser:
    parser = Parser("python -m pipeline.kept", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", action="append", help="a folder of runs; may be repeated (default: outputs)")
    parser.add_argument("--uri", help="a local MLflow store (default: sqlite:///mlflow.db, where there is one)")
    parser.add_argument("--store", help="folder of the engine store (default: that of the user's cache)")
    parser.add_argument("--limit-gib", type=float, help="remove engines until the rest takes no more than this")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    try:
        return _main(_parser().parse_args(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(asked: Namespace) -> int:
    limit = asked.limit_gib
    if limit is not None and not 0 <= limit < float("inf"):
        raise UserError(f"--limit-gib {limit}: must be at least 0")
    outputs = [Path(each) for each in asked.output or ["outputs"]]
    for folder in outputs if asked.output else ():
        if not folder.is_dir():
            raise UserError(f"--output {folder}: there is no such folder")
    tracked, needed = _tracked(asked.uri)
    store = root_of(StoreConfig(folder=asked.store))
    if asked.store and not store.is_dir():
        raise UserError(f"--store {store}: there is no such folder")
    kept = found([*outputs, *tracked, store])
    names = sum(len(each.folders) for each in kept)
    print(f"{_said(kept)} on disk, under {names} names, in {', '.join(map(_shown, [*outputs, *tracked, store]))}")
    if limit is None:
        return 0
    gone = excess(kept, limit * GIB, needed)
    for each in gone:
        if not asked.dry_run:
            remove(each)
        day = datetime.fromtimestamp(each.used).date().isoformat()
        print(f"{'would remove' if asked.dry_run else 'removed'}: {each.bytes / GIB:.2f} GiB, last used {day}, of "
              f"{', '.join(map(_shown, each.folders))}")  # fmt: skip
    left = [each for each in kept if each not in gone]
    why = "; the rest is what aliases of the registry point to" if sum(e.bytes for e in left) > limit * GIB else ""
    print(f"{'would keep' if asked.dry_run else 'kept'}: {_said(left)}{why}")
    return 0


def _tracked(uri: str | None) -> tuple[list[Path], list[Path]]:
    """Folders of artifacts on this machine, and those of the runs that an alias of the registry points to."""
    from pipeline.tracking.store import as_user_error, check_store, folder_at, folder_of, open_client, quiet

    if uri is None and not Path("mlflow.db").exists():
        return [], []
    with as_user_error("--uri"), quiet():
        client = open_client(check_store(uri or "sqlite:///mlflow.db", must_exist=True))
        runs = [
            client.get_run(client.get_model_version(model.name, version).run_id)
            for model in client.search_registered_models()
            for version in {str(each) for each in model.aliases.values()}
        ]
        experiments = [each.artifact_location for each in client.search_experiments()]
    return [each for each in map(folder_at, experiments) if each], [each for each in map(folder_of, runs) if each]


def _said(kept: list[Kept]) -> str:
    engines = "1 engine" if len(kept) == 1 else f"{len(kept)} engines"
    return f"{engines}, {sum(each.bytes for each in kept) / GIB:.2f} GiB"


def _shown(path: Path) -> str:
    """From the working folder, where it is below it."""
    path = path.resolve()
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
