"""``python -m pipeline``: Hydra's command line over :func:`pipeline.run.run`.

Everything that can be wrong with the settings is found before a job is started, so that it costs one line,
exit code 2 and no folder.  Exit code 1: a run, or a job of a sweep, failed, and its report says how.  130 and 143:
Ctrl-C and SIGTERM; the report of the run that they ended is kept.  docs/endings.md has the whole table.
"""

from __future__ import annotations

if __name__ == "__main__":  # imports this module by its name, and does not come back
    from pipeline.start import main as start

    start()

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from passes.errors import UserError
from pipeline.config.compose import from_hydra
from pipeline.config.idle import refuse_idle
from pipeline.config.overrides import combinations, explained, for_hydra, model_by_name, quoted, read, typed
from pipeline.config.schema import Config
from pipeline.host import gpu
from pipeline.host.files import DISK, said_by_the_disk
from pipeline.host.memory import collector_paused
from pipeline.private import of_hydra

EXTRAS = {
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
    "joblib": "joblib",
    "ray": "ray",
    "optuna_tpe": "optuna",
}
"""Hydra's launchers and sweepers that conf/hydra is ready for -> the extra that installs them."""


def config_dir() -> Path:
    """``conf/`` of the checkout, or its copy in the installed package."""
    beside = Path(__file__).resolve().parent.parent / "conf"
    return beside if (beside / "config.yaml").is_file() else Path(__file__).resolve().parent / "conf"


def main() -> int:
    """The whole command, once signals are handled (:mod:`pipeline.start`); returns its exit code."""
    # Read when torch is loaded.  By default its threads wait for each other busily, and where another process is on
    # one of their cores short operations take 30 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # MLflow's client would otherwise ask a server that went down again for minutes, and the report is on disk anyway.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    # "Is there a GPU?" is then answered without initialising CUDA, which would not survive the fork of a sweep's job.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # CUDA then counts cards as NVML and nvidia-smi do, so that which one it is needs no CUDA either.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # conf/hydra has files of the names that plugins of Hydra have schemas for: they shall be checked against those.
    warnings.filterwarnings("ignore", "(?s).*validated against ConfigStore schema", UserWarning)
    try:
        return _main(sys.argv[1:])
    except UserError as error:
        _print_error(error)
        return 2
    except OSError as error:  # outside of any run: a sweep's own files
        if error.errno not in DISK:
            raise
        print(f"error: {said_by_the_disk(error)}", file=sys.stderr)
        return 1


@contextmanager
def _wrapped() -> Iterator[None]:
    """What is printed to standard output goes there in lines of 80 characters: Hydra lists a group in a single one."""
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            print(textwrap.fill(line, 80, subsequent_indent="    ") if len(line) > 80 else line)


def _main(arguments: list[str]) -> int:
    if "--version" in arguments:  # Hydra's parser would answer with its own
        print(f"proved-attention {_version()}")
        return 0
    parsed = _parse(arguments)
    if parsed.help or parsed.hydra_help or parsed.info is not None or parsed.shell_completion:
        with _wrapped() if parsed.help else nullcontext():
            _hydra(arguments, lambda composed: None)
        return 0
    options = list(arguments)
    for argument in parsed.overrides:
        options.remove(argument)
    name, own_dir = parsed.config_name or "config", parsed.config_dir
    overrides, base = _read(parsed.overrides, parsed.multirun, name, own_dir)
    if parsed.cfg is None and (parsed.multirun or base.hydra.mode == RunMode.MULTIRUN):
        if not parsed.multirun:  # the YAML asks for a sweep
            overrides, base = _read(parsed.overrides, True, name, own_dir)
        arguments = [*options, *(str(override.input_line) for override in overrides)]
        return _sweep(arguments, overrides, base, lambda job: compose_config(job, name, own_dir))
    arguments = [*options, *(str(override.input_line) for override in overrides)]
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(f"{typed(str(override.input_line))}: several values are a sweep; add -m")
    config = _validated(base)
    if parsed.cfg is None:
        refuse_idle(_by_key(overrides), [config], sweep=False)
    if config.tracking.register:
        raise UserError("tracking.register=true: enters the best of a sweep; add -m, or leave it out")
    if config.dry_run and parsed.cfg is None:
        from pipeline.sweep.estimate import show
        from pipeline.sweep.jobs import plan

        show(plan([([], config)]))
        return 0
    codes = [0]

    def job(composed: DictConfig) -> None:
        from pipeline.run import run

        try:
            outcome = run(_validated(composed))
        except UserError as error:  # found by the load stage
            _print_error(error)
            codes.append(2)
        else:
            codes.append(1 if outcome.report["status"] == "failed" else 0)

    _hydra(arguments, job)
    return max(codes)


def _sweep(
    arguments: list[str], overrides: list[Override], base: DictConfig, composed: Callable[[list[str]], Config]
) -> int:
    """All jobs of a sweep.  Hydra's own loop comes in only where its launcher or sweeper is another than the basic
    one: it composes every job twice more."""
    from pipeline.sweep.jobs import plan
    from pipeline.sweep.keys import settings_key
    from pipeline.sweep.run import Task, sweep
    from pipeline.sweep.table import check_baseline

    sweeper, launcher = base.hydra.sweeper, base.hydra.launcher
    if not overrides and not sweeper.params:
        raise UserError("-m: a sweep over nothing; name settings with their values, such as strategy=lowering,upstream")
    _check_plugins(base)
    jobs = None
    if sweeper._target_.endswith(".BasicSweeper"):
        params = [for_hydra(f"{key}={value}", True) for key, value in (sweeper.params or {}).items()]
        swept = [*read(params), *overrides]
        with collector_paused():
            every = [(job, composed(job)) for job in combinations(swept)]
        refuse_idle(_by_key(overrides), [config for _, config in every], sweep=True)
        jobs = plan(every)
    config = jobs[0].config if jobs else _validated(base)
    if config.sweep.baseline is not None and jobs is not None:
        check_baseline(config.sweep.baseline, [job.config.to_dict() for job in jobs])
    if config.dry_run:
        from pipeline.sweep.estimate import show

        if jobs is None:
            raise UserError(f"dry_run=true: only {sweeper._target_} knows its jobs, as they come; leave it out")
        show(jobs)
        return 0

    def launch(task: Task, folder: Path) -> None:
        fixed = frozenset(override.key_or_group for override in overrides if not override.is_sweep_override())
        _hydra([*arguments, f"hydra.sweep.dir={quoted(str(folder))}"], replace(task, fixed=fixed))

    identity = OmegaConf.to_yaml({"settings": settings_key(config), "sweeper": sweeper, "overrides": arguments})
    return sweep(config, jobs, identity, None if jobs and launcher._target_.endswith(".BasicLauncher") else launch)


def _check_plugins(base: DictConfig) -> None:
    """Raises :class:`UserError` for a launcher or sweeper of Hydra's that cannot do the jobs here."""
    for group in ("sweeper", "launcher"):
        chosen, target = base.hydra.runtime.choices[f"hydra/{group}"], base.hydra[group]._target_
        package = ".".join(target.split(".")[:2])
        if package.startswith("hydra_plugins.") and (find_spec("hydra_plugins") is None or find_spec(package) is None):
            remedy = f"pip install 'proved-attention[{EXTRAS[chosen]}]'" if chosen in EXTRAS else f"install {package}"
            raise UserError(f"hydra/{group}={chosen}: not installed; {remedy}")
    ray = base.hydra.launcher.get("ray")
    here = ray and ray.init.get("address") is None and "RAY_ADDRESS" not in os.environ
    if here and ray.remote.get("num_gpus") and gpu.card().name is None:
        raise UserError(
            "hydra/launcher=ray: its jobs would wait for a GPU, and this machine has none; add "
            "hydra.launcher.ray.remote.num_gpus=0, or name a cluster, hydra.launcher.ray.init.address=HOST:PORT"
        )


def _hydra(arguments: list[str], task: Callable[[DictConfig], Any]) -> None:
    of_hydra.start(arguments, task, config_dir())


def _version() -> str:
    try:
        return version("proved-attention")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def _print_error(error: UserError) -> None:
    print("error: " + str(error).replace("\n", "\\n"), file=sys.stderr)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Hydra's own command line; what cannot be taken is refused in one line."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; settings are written key=value, --help shows them")

    parser = of_hydra.parser()
    parser.error = refuse  # type: ignore[method-assign]  # argparse's way prints its usage over the message
    parsed = parser.parse_intermixed_args(arguments)  # -m may stand anywhere
    if parsed.config_path is not None:
        raise UserError(f"--config-path={parsed.config_path}: not taken; --config-dir DIR adds your own YAML to conf/")
    if parsed.experimental_rerun is not None:
        raise UserError(f"--experimental-rerun={parsed.experimental_rerun}: not taken; repeat the command instead")
    if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
        raise UserError(f"--config-dir={parsed.config_dir}: no such folder; name one that is laid out as conf/ is")
    return parsed


def compose_config(overrides: list[str], name: str = "config", own_dir: str | None = None) -> Config:
    """The validated configuration of one job; raises :class:`UserError`.

    ``name`` is the primary config, ``own_dir`` a folder of the user's that is searched beside ``conf/``.
    """
    given = [
        for_hydra(each, False) if each != override else each
        for override in overrides
        for each in model_by_name(override, False, _known(own_dir))
    ]
    return _validated(_compose(given, name, own_dir))


def _validated(composed: DictConfig) -> Config:
    def describe(source: str, revision: str | None) -> dict[str, Any]:
        from pipeline.model.checkpoint import described

        return described(source, revision)

    return from_hydra(composed, describe)


def _known(own_dir: str | None) -> Callable[[str], bool]:
    """Whether conf/, or the user's folder beside it, has a model of that name."""
    folders = [config_dir(), *([Path(own_dir)] if own_dir is not None else [])]
    return lambda name: any((folder / "model" / f"{name}.yaml").is_file() for folder in folders)


def _compose(overrides: list[str], name: str, own_dir: str | None) -> DictConfig:
    """What ``overrides`` make of the YAML, Hydra's own settings included."""
    search = [] if own_dir is None else [f"hydra.searchpath=[file://{Path(own_dir).resolve()}]"]
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(name, overrides=[*overrides, *search], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(explained(error, overrides, config_dir())) from None


def _read(given: list[str], several: bool, name: str, own_dir: str | None) -> tuple[list[Override], DictConfig]:
    """The overrides of the command line, and what those that have one value make of the YAML."""
    written_out = (each for argument in given for each in model_by_name(argument, several, _known(own_dir)))
    overrides = read(for_hydra(argument, several) for argument in written_out)
    fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    return overrides, _compose(fixed, name, own_dir)


def _by_key(overrides: list[Override]) -> dict[str, str]:
    """Key -> what was typed."""
    return {override.key_or_group: typed(str(override.input_line)) for override in overrides}


if __name__ == "__main__":
    main()
