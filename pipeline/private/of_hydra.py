"""Of Hydra: its command line as a parser, and its start with arguments that are handed over.

The public ``hydra.main`` reads ``sys.argv``, where the arguments are as they were typed; ``hydra.compose`` starts no
launcher and no sweeper.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import version

from passes.private.part import part


def parser() -> ArgumentParser:
    """What reads Hydra's own command line: ``overrides`` and the options that ``--hydra-help`` lists."""
    found: ArgumentParser = part("hydra._internal.utils:get_args_parser")()
    return found


def start(arguments: list[str], task: Callable[[Any], Any], conf: Path) -> None:
    """What a program whose ``main`` is ``task`` does on this command line: runs it, once or as a sweep with its
    launcher, or prints what the options ask for; ``conf`` has ``config.yaml``."""
    version.setbase("1.3")
    own = parser()
    part("hydra._internal.utils:_run_hydra")(
        args=own.parse_args(arguments),
        args_parser=own,
        task_function=task,
        config_path=str(conf),
        config_name="config",
    )
