"""One family in one call form, through the pipeline as ``python -m pipeline`` would take it: a row of the table.

The run builds real engines; without a GPU they are built ahead of time, and what is compared with PyTorch is the graph
that each was made from.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.families import RECURRENT, described
from passes.errors import UserError, first_line

if TYPE_CHECKING:
    from pipeline.config.schema import Config

FORMS: dict[str, tuple[str, ...]] = {
    "prompt": ("model.inputs=[input_ids]", "benchmark=none"),
    "padded prompt": ("model.inputs=[input_ids,attention_mask]", "benchmark=none"),
    "generation": (
        "cache=in_engine", "benchmark=generate", "benchmark.generate.input_length=26",
        "benchmark.generate.output_length=8",
    ),
}  # fmt: skip
"""What is asked of the command line; windows, chunks and boundaries of rotary factors lie between the lengths."""
LENGTHS = ("shape.min=1", "shape.opt=24", "shape.max=40", "shape.exact=[]")
LONGER = ("shape.max=150", "benchmark.generate.input_length=140")
"""Of a generation whose prompts run in chunks."""
APART = ("store.enabled=false", "tracking.uri=sqlite:///nowhere.db")

RIGHT, REFUSED, STOPPED, WRONG, CRASHED, LATE, NONE = (
    "right", "refused", "stopped", "wrong", "crashed", "timed out", "no tiny model",
)  # fmt: skip
"""What became of a form.  ``refused``: before anything was built, in one line.  ``stopped``: later, in one line.
``crashed``: with an error that is none of ours.  ``no tiny model``: transformers refused the sizes."""
BEFORE = ("load", "export", "strategy")
"""Stages in which nothing has been built."""


@dataclass(frozen=True)
class Row:
    """A family in a form."""

    family: str
    form: str
    outcome: str
    reason: str = ""
    """Why it is not ``right``; one line."""
    stage: str = ""
    """The stage that it ended in, where that was early."""
    masks: dict[str, list[str]] = field(default_factory=dict)
    """Of each program the masks as they were proved, ``2 x causal: native_causal``."""
    written_out: int = 0
    """Softmax layers of the engines beyond their native attention's: attention written out, or experts' choice."""
    unfused: list[str] = field(default_factory=list)
    """Forms of native attention layers that have no fused kernel."""
    cases: int = 0
    """Inputs on which logits were compared."""
    tokens: int = 0
    """Generated tokens that were compared."""
    error: float | None = None
    """The largest relative error over the inputs, in the arithmetic of the precision, beside what was allowed there."""
    allowed: float | None = None
    seconds: float = 0.0
    versions: str = ""


class _Untracked:
    """Stands in for a run of MLflow's (:class:`pipeline.tracking.runs.Tracked`): nothing is kept."""

    run_id, identity, where = "", None, ""

    def finish(self, report: Mapping[str, Any], folder: Path) -> bool:
        return True

    def __enter__(self) -> _Untracked:
        return self

    def __exit__(self, *_: object) -> None: ...


def versions() -> str:
    """Of what decides the outcome."""
    return ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "torch-tensorrt-rtx"))


def settings(family: str, form: str, output: Path) -> Config:
    """The run's settings; raises what transformers raises where it refuses the tiny model's config."""
    from pipeline.__main__ import compose_config
    from pipeline.config.schema import ModelConfig

    longer = LONGER if form == "generation" and family in RECURRENT else ()
    config = compose_config([*LENGTHS, *APART, *FORMS[form], *longer, f"output={output}"])
    # At every place: the last row of a model of one layer hangs on no other row.
    logits = "last" if form == "generation" else "all"
    config.model = ModelConfig(
        family, weights="random", inputs=config.model.inputs, logits=logits, architecture=described(family)
    )
    return config


def row(family: str, form: str) -> Row:
    """Run ``family`` in ``form``, in a folder that goes again."""
    from rich.console import Console

    from pipeline.record.console import StageDisplay
    from pipeline.run import run

    started = time.monotonic()

    def ended(outcome: str, reason: str = "", stage: str = "", **found: Any) -> Row:
        seconds = round(time.monotonic() - started, 1)
        return Row(family, form, outcome, reason, stage, **found, seconds=seconds, versions=versions())

    with tempfile.TemporaryDirectory() as folder:
        try:
            config = settings(family, form, Path(folder))
        except Exception as error:  # whatever transformers raises first
            return ended(NONE, " ".join(first_line(error).split()))
        try:
            display = StageDisplay(Console(file=io.StringIO()))
            report = run(config, display, track=lambda *_, **__: _Untracked()).report
        except UserError as error:
            return ended(REFUSED, str(error), "load")
    return ended(*_outcome(report), **_found(report))


def _outcome(report: Mapping[str, Any]) -> tuple[str, str, str]:
    failure = report["failure"]
    if failure is None:
        return RIGHT, "", ""
    stage, reason = failure["stage"], failure["message"]
    if failure["kind"] == "accuracy":
        return WRONG, reason, stage
    if failure.get("traceback"):
        return CRASHED, f"{failure['kind']}: {reason}", stage
    return (REFUSED if stage in BEFORE else STOPPED), reason, stage


def _found(report: Mapping[str, Any]) -> dict[str, Any]:
    """What ``report`` says of masks, layers and the comparison, as fields of a :class:`Row`."""
    programs = {"prompt": report, "step": report["decode"] or {}}
    found: dict[str, Any] = {"masks": {}, "written_out": 0, "unfused": []}
    for name, program in programs.items():
        if attention := program.get("attention"):
            kinds = Counter(f"{call['mask']} ({call['proof']}): {call['action']}" for call in attention["calls"])
            found["masks"][name] = [f"{count} x {kind}" for kind, count in kinds.items()]
        if engine := program.get("engine"):
            found["written_out"] += engine["softmax"]
            found["unfused"] += [f"{name}: {each['form']}" for each in engine["unfused"]]
    if verification := report["verify"]:
        cases = verification["cases"]
        worst = max(cases, key=lambda case: case["relative_error"] / case["tolerance"], default=None)
        found["cases"] = len(cases)
        if worst is not None:
            found["error"], found["allowed"] = (float(f"{worst[key]:.2g}") for key in ("relative_error", "tolerance"))
        generations = (verification["generation"] or {}).get("cases", ())
        found["tokens"] = sum(each["tokens"] for each in generations)
    return found


def to_json(made: Row) -> dict[str, Any]:
    """``made`` without what is empty."""
    return {key: value for key, value in asdict(made).items() if value not in ("", [], {}, None, 0)}
