"""What is asked of weights of fewer bits, and what of it cannot be had."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from passes.errors import UserError
from passes.precision import BASES, FEW_BITS, number_type
from pipeline.config.refusals import at_least, one_of


@dataclass
class CalibrationConfig:
    """On what text rows are looked at, where their size decides: of ``fp8``, and of ``quantize.method=gptq`` and
    ``awq``."""

    text: str | None = None
    """A UTF-8 file; null: docstrings of Python's standard library, other ones than quality is judged on."""
    samples: int | None = None
    """Pieces of the text; null: 32 with ``gptq``, which solves for more numbers, 16 else."""
    length: int = 512
    """Tokens of each sample."""
    seed: int | None = None
    """Of where the samples begin; null: the run's."""


@dataclass
class QuantizeConfig:
    """How weights are made smaller, where ``precision`` is one of fewer bits; see docs/precision.md."""

    base: str | None = None
    """What everything else is: ``fp16`` or ``bf16``; null: fp16."""
    without: list[str] = field(default_factory=list)
    """Layers that stay as they are, by name or pattern: ``[lm_head, "model.layers.0.*"]``."""
    block: int | None = None
    """int4_weights only: elements along the input that share a scale; null: the most of 128, 64 and 32 that divides
    every layer's."""
    method: str | None = None
    """``round``: each weight to the nearest; ``gptq``: so that the next ones make up for what it lost; ``awq``: to the
    nearest, after the channels that matter most were widened; null: round."""
    prompt: str | None = None
    """How the engine of a generation's prompt holds the same weights: ``precision`` or ``base``; null: the first."""
    step: str | None = None
    """The same of the engine of the tokens after it."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def holds_few_bits(self, program: str, precision: str, cached: bool) -> bool:
        """Whether the engine of ``program``, ``engine`` or ``decode``, holds weights of fewer bits as such."""
        form = self.prompt if program == "engine" else self.step
        return precision in FEW_BITS and (not cached or form in (None, precision))

    def products_in(self, precision: str) -> str:
        """In what type a run multiplies: its numbers', or that of few bits to which rows are rounded too."""
        few = FEW_BITS.get(precision)
        return precision if few is not None and few.rounds_rows else number_type(precision, self.base)


def check_quantize(precision: str, asked: QuantizeConfig, backend: str, strategy: str) -> None:
    """Raises :class:`UserError` for what cannot be had of ``precision``."""
    few = FEW_BITS.get(precision)
    if few is None:
        return
    if backend != "tensorrt":
        raise UserError(
            f"precision={precision}: backend={backend} has no weights of fewer bits; set precision={BASES[0]}, or "
            f"backend=tensorrt"
        )
    if strategy == "upstream":
        raise UserError(
            f"precision={precision}: strategy=upstream runs none of our converters, which make such weights; set "
            f"precision={BASES[0]}, or another strategy"
        )
    base = number_type(precision, asked.base)
    every = [each for one in FEW_BITS.values() for each in one.methods]
    for key, value, allowed in (
        ("base", asked.base, BASES),
        ("method", asked.method, few.methods if len(few.methods) > 1 else every),
        ("block", asked.block, few.blocks or (asked.block,)),
        ("prompt", asked.prompt, (precision, base)),
        ("step", asked.step, (precision, base)),
    ):
        if value is not None:
            one_of(f"quantize.{key}", value, dict.fromkeys(allowed))
    if asked.prompt == asked.step == base:
        raise UserError(
            f"quantize.prompt={base} quantize.step={base}: then no engine has smaller weights; set precision={base}"
        )
    calibration = asked.calibration
    for key, number, least in (("samples", calibration.samples, 1), ("length", calibration.length, 2),
                               ("seed", calibration.seed, 0)):  # fmt: skip
        if number is not None:
            at_least(f"quantize.calibration.{key}", number, least)
    if calibration.text is not None and not Path(calibration.text).is_file():
        raise UserError(
            f"quantize.calibration.text={calibration.text}: no such file; name a text file, or null for Python's "
            f"docstrings"
        )


def idle_of_quantize(precision: str, asked: QuantizeConfig, cached: bool) -> dict[str, str]:
    """Settings, or all of them, that change nothing in a run -> why."""
    few = FEW_BITS.get(precision)
    if few is None:
        return {"quantize": f"precision={precision} has no weights of fewer bits"}
    found = {}
    if not few.blocks:
        found["quantize.block"] = f"precision={precision} has a scale for each output channel"
    if len(few.methods) == 1:
        found["quantize.method"] = f"precision={precision} always rounds to the nearest"
    if not few.calibrated(asked.method):
        found["quantize.calibration"] = "no rows are looked at to round these weights"
    if not cached:
        found |= dict.fromkeys(("quantize.prompt", "quantize.step"), "cache=none has one engine for both")
    return found
