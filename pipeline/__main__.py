"""``python -m pipeline``: Hydra's command line over :func:`pipeline.run.run`.

Everything that can be wrong with the settings is found before Hydra starts a job, so that it costs one line,
exit code 2 and no folder.  Exit code 1: a run failed, and its report says how.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from passes.errors import UserError
from pipeline.config import Config, from_hydra, schema_keys


def config_dir() -> Path:
    """``conf/`` of the checkout, or its copy in the installed package."""
    beside = Path(__file__).resolve().parent.parent / "conf"
    return beside if (beside / "config.yaml").is_file() else Path(__file__).resolve().parent / "conf"


def main() -> None:
    try:
        sys.exit(_main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _main(arguments: list[str]) -> int:
    arguments = [_admit(argument) for argument in arguments]
    parsed = get_args_parser().parse_args(arguments)
    asks_only = parsed.help or parsed.hydra_help or parsed.cfg or parsed.info is not None or parsed.shell_completion
    if not asks_only:
        for job in _jobs(parsed.overrides, parsed.multirun):
            compose_config(job)
    failed = []

    def job(composed: DictConfig) -> None:
        from pipeline.run import run

        outcome = run(from_hydra(composed))
        if outcome.report["status"] == "failed":
            failed.append(outcome.folder)

    sys.argv[1:] = arguments
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(job)()
    return 1 if failed else 0


def compose_config(overrides: list[str]) -> Config:
    """The validated configuration of one job; raises :class:`UserError`."""
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("config", overrides=[item for item in overrides if not item.startswith("hydra")])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, overrides)) from None
    return from_hydra(composed)


def _jobs(overrides: list[str], multirun: bool) -> Iterator[list[str]]:
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise UserError(f"{error.override}: cannot be read; settings are written key=value") from None
    if multirun:
        yield from (job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch)
        return
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: several values are a sweep; add -m")
    yield overrides


def _admit(argument: str) -> str:
    """``a.b=c`` sets what the schema knows, also where the YAML leaves it out (Hydra's ``++``)."""
    key, equals, _ = argument.partition("=")
    group, dot, name = key.rpartition(".")
    return f"++{argument}" if equals and dot and name in schema_keys(group) else argument


def _one_line(error: Exception, overrides: list[str]) -> str:
    """What Hydra says in several lines, with the override that it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for override in overrides:
        key, _, value = override.partition("=")
        if f"'{key}/{value}'" in lines[0]:  # Could not find 'strategy/foo'
            options = sorted(path.stem for path in (config_dir() / key).glob("*.yaml"))
            return f"{override}: allowed are {', '.join(options)}"
        if f"'{key.lstrip('+~')}'" in lines[0]:
            group = key.lstrip("+~").rpartition(".")[0]
            return f"{override}: no such setting; allowed here: {', '.join(schema_keys(group))}"
    return " ".join(lines)


if __name__ == "__main__":
    main()
