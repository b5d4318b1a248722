"""What is asked of the verification: on what an engine is judged, and what its precision may cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from passes.errors import UserError
from passes.precision import FEW_BITS
from pipeline.config.refusals import at_least


@dataclass
class VerifyConfig:
    """What the engine is compared on."""

    lengths: list[int] | None = None
    """Sequence lengths in tokens; null: chosen over the whole profile."""
    samples: int = 1
    """Inputs for each length."""
    quality: bool | None = None
    """Whether perplexity is measured beside that of the unquantised model (:mod:`pipeline.verify.quality`); null: where
    the precision is a quantised one."""
    text: str | None = None
    """A UTF-8 file on which that is measured; null: the docstrings of Python's standard library."""
    max_perplexity_increase: float | None = 0.05
    """By how much perplexity may rise, as a share of the unquantised model's; null: by any."""

    def judges_quality(self, precision: str) -> bool:
        """Whether a run at ``precision`` is asked what that costs."""
        return precision in FEW_BITS if self.quality is None else self.quality


def check_verification(asked: VerifyConfig) -> None:
    """Raises :class:`UserError` for what cannot be asked."""
    at_least("verify.samples", asked.samples, 1)
    allowed = asked.max_perplexity_increase
    if allowed is not None and not 0 <= allowed < float("inf"):  # NaN is in no range
        raise UserError(
            f"verify.max_perplexity_increase={allowed}: must be a number from 0, such as 0.05 for 5 %, or null for any"
        )
    if asked.text is not None and not Path(asked.text).is_file():
        raise UserError(f"verify.text={asked.text}: no such file; name a text file, or null for Python's docstrings")
