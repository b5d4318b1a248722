"""Numbers for people."""

from __future__ import annotations

import math


def number(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, never as 1e+03: 12.5, 1250, 0.0123."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}"
