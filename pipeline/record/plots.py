"""Pictures for a run's artifacts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.host.files import draft

PICTURE = "all_times.png"
"""Of a run's samples.  MLflow lists artifacts by name, and this one is the first."""


def latency_plot(samples: Mapping[str, Any], path: Path) -> None:
    """Write the distribution of every measurement in ``samples``, with its median and 95 % interval, to ``path``.

    ``samples`` maps names to times in ms, or to such mappings (samples.json): one panel each, since device, host
    and enqueue times differ by orders of magnitude.  ``step_ms`` is no distribution: it is drawn step by step, for
    the cache grows.  Raises ``ValueError`` when there is no sample at all.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # the object API: pyplot would keep figures and a backend globally

    from pipeline.measure.statistics import median_interval

    series = [(name, np.asarray(values, dtype=float)) for name, values in _series(samples) if len(values)]
    if not series:
        raise ValueError("no samples to plot")
    figure = Figure(figsize=(8, 2.2 * len(series)), layout="constrained")
    FigureCanvasAgg(figure)
    for (name, values), axes in zip(series, figure.subplots(len(series), squeeze=False)[:, 0], strict=True):
        if name.rpartition(".")[2] == "step_ms":
            axes.plot(np.arange(1, len(values) + 1), values, color="tab:red", linewidth=0.8)
            axes.set(title=f"{name}, median of each decode step", xlabel="step", ylabel="ms")
            continue
        low, high = median_interval(values.tolist())
        axes.hist(values, bins=min(60, max(10, len(values) // 5)), color="0.7")
        axes.axvspan(low, high, color="tab:orange", alpha=0.3, label=f"95 % interval {low:.4g} to {high:.4g} ms")
        for edge in (low, high):
            axes.axvline(edge, color="tab:orange", linewidth=0.8, linestyle="--")
        axes.axvline(np.median(values), color="tab:red", label=f"median {np.median(values):.4g} ms")
        axes.set(title=f"{name}, n = {len(values)}", xlabel="ms", ylabel="samples")
        axes.legend(fontsize="small")
    with draft(path) as part:
        figure.savefig(part, dpi=120, format="png")


def _series(samples: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Sequence[float]]]:
    for name, value in samples.items():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from _series(value, full)
        else:
            yield full, value
