"""A report as a row of the comparison: what it ran, what it measured, or why it measured nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from passes.errors import UserError
from pipeline.compare.sources import Found
from pipeline.config.axes import Axes, axes, settings
from pipeline.config.choices import STRATEGIES
from pipeline.record.report import GRAPH, engine_bytes, error_share, times_count, verified_by, worst_case

RIVALS = {"torch_compile": "torch.compile", "eager": "PyTorch eager", "plugin": "attention plugin"}
"""What people call them, where it is not the backend's name."""
CLOCKS = ("device_ms", "ttft_ms", "tpot_ms")


class Measure(NamedTuple):
    """What was timed.  Only times of one measure can be compared."""

    kind: str
    """``prefill`` or ``generate``."""
    batch: int
    input_length: int
    output_length: int
    """0 for a prefill."""
    clock: str
    """``device_ms`` of all of it, ``ttft_ms`` to the first token, ``tpot_ms`` for each later one."""

    @property
    def what(self) -> str:
        whole = "prefill" if self.kind == "prefill" else "whole generation"
        return {"ttft_ms": "time to first token", "tpot_ms": "time per output token"}.get(self.clock, whole)

    @property
    def size(self) -> str:
        more = f" + {self.output_length}" if self.output_length else ""
        return f"{self.batch} × {self.input_length}{more} tokens"

    @property
    def question(self) -> str:
        """For a title: what a person would ask for."""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        if self.kind == "prefill":
            return f"A prompt of {self.input_length} tokens{batch}"
        size = f"{self.input_length} tokens in, {self.output_length} out{batch}"
        return {"device_ms": f"Generation, {size}"}.get(self.clock, f"{self.what.capitalize()}, {size}")

    def __str__(self) -> str:
        return f"{self.what}, {self.size}"


@dataclass(frozen=True)
class Figure:
    """A median in ms with its 95 % interval, and the samples that it is of, where they were kept."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class Timing:
    """One measure of one row."""

    time: Figure
    host_ms: float | None
    floor_ms: float | None
    roofline_fraction: float | None
    tainted: list[str]


@dataclass(frozen=True)
class Accuracy:
    """The case of the verification that came closest to what is allowed."""

    executed: str
    """``engine``, the rival's name, or ``graph`` where no engine could run."""
    case: str
    relative_error: float | None
    tolerance: float | None
    share: float
    """Relative error over tolerance; infinite where there was no finite answer."""
    pytorch_share: float | None
    """The same of PyTorch at this precision."""
    passed: bool


@dataclass(frozen=True)
class Cost:
    """What the precision cost on real text, beside the unquantised model."""

    perplexity: float
    reference: float
    """Of the unquantised model."""
    increase: float
    """As a share, with its 95 % interval."""
    low: float
    high: float
    tokens: int
    text: str
    """Its sha256: only what was measured on one text is compared."""
    passed: bool


@dataclass
class Row:
    """One report."""

    name: str
    axes: Axes
    known: frozenset[str]
    """Every axis that the report's version had, unset ones too."""
    status: str
    reason: str | None
    """Why nothing was timed; None where something was."""
    timings: dict[Measure, Timing]
    accuracy: Accuracy | None
    cost: Cost | None
    """None where it was not measured, or is no number."""
    stages_s: dict[str, float]
    environment: dict[str, Any]
    attention: str | None
    """The engine's native attention layers, by kind."""
    engine_bytes: int | None
    bytes: int | None
    """Of all its engines: with a KV cache there are two."""
    peak_bytes: int | None
    notes: list[str]
    link: str | None
    runs: int = 1
    """Reports that it is of: of repetitions several."""
    label: str = field(default="")
    """What tells it from the rows beside it; set by :func:`pipeline.compare.labels.label`."""

    @property
    def rival(self) -> str | None:
        """The backend, where it is not TensorRT."""
        backend = self.axes.get("backend.name", "tensorrt")
        return None if backend == "tensorrt" else backend

    @property
    def how(self) -> str:
        """The strategy, or the rival."""
        if self.rival:
            return RIVALS.get(self.rival, self.rival)
        name, unproven = self.axes.get("strategy.name", "?"), self.axes.get("strategy.unproven")
        special = [unproven] if unproven and unproven not in STRATEGIES.get(name, ())[:1] else []
        assume = self.axes.get("strategy.assume")
        special += [f"assume {assume.strip('[]').replace(',', ', ')}"] if assume else []
        return f"{name} ({', '.join(special)})" if special else name

    @property
    def model(self) -> str:
        random = " (random weights)" if self.axes.get("model.weights") == "random" else ""
        return self.axes.get("model.name", "?") + random

    @property
    def gpu(self) -> str | None:
        return self.environment.get("gpu")

    @property
    def supported(self) -> bool:
        """False where the vendor does not support this GPU."""
        return self.environment.get("supported_by_vendor") is not False


def row(found: Found) -> Row:
    """The row of a report; raises :class:`UserError` for a report that lacks what every schema has."""
    report = found.report
    try:
        timings = dict(_timings(report, found.samples)) if report["status"] == "ok" and times_count(report) else {}
        engine = report.get("engine") or {}
        memory = (report.get("benchmark") or {}).get("memory") or {}
        return Row(
            name=found.name,
            axes=axes(report["config"]),
            known=frozenset(key for key, _ in settings(report["config"])),
            status=report["status"],
            reason=None if timings else _reason(report),
            timings=timings,
            accuracy=_accuracy(report.get("verify")),
            cost=_cost(report.get("quality") or {}),
            stages_s={str(name): float(seconds) for name, seconds in (report.get("stages_s") or {}).items()},
            environment=dict(report.get("environment") or {}),
            attention=_attention(engine),
            engine_bytes=int(engine["bytes"]) if engine.get("bytes") else None,
            bytes=engine_bytes(report),
            peak_bytes=None if memory.get("peak_bytes") is None else int(memory["peak_bytes"]),
            notes=[str(note) for note in report.get("notes") or []],
            link=found.link,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"{error}"
        raise UserError(f"{found.name}: is no report of a run ({what})") from None


def _timings(report: Mapping[str, Any], samples: Mapping[str, Any]) -> Iterator[tuple[Measure, Timing]]:
    benchmark = report.get("benchmark") or {}
    entries = [("prefill", "prefill", benchmark.get("prefill")), ("generate", "generate", benchmark.get("generate"))]
    entries += [
        (f"prefill_{entry['batch']}x{entry['input_length']}", "prefill", entry)
        for entry in benchmark.get("prefill_shapes") or []
    ]
    for name, kind, entry in entries:
        if not entry:
            continue
        for clock in CLOCKS:
            if not entry.get(clock):
                continue
            whole = clock == "device_ms"
            size = int(entry["batch"]), int(entry["input_length"]), int(entry.get("output_length") or 0)
            figure = _figure(entry[clock], (samples.get(name) or {}).get(clock) or ())
            host = (entry.get("host_ms") or {}).get("median") if whole else None
            step = benchmark.get("decode") or {} if clock == "tpot_ms" else {}
            bound = entry if whole else step  # what has the floor of this time
            tainted = [str(taint) for taint in entry.get("tainted") or []]
            yield (
                Measure(kind, *size, clock),
                Timing(
                    figure,
                    _number(host),
                    _number(bound.get("floor_ms")),
                    _number(bound.get("roofline_fraction")),
                    tainted,
                ),
            )


def _figure(summary: Mapping[str, Any], samples: Any) -> Figure:
    low, high = summary["ci95"]
    median = float(summary["median"])
    if not 0 < median < float("inf"):
        raise ValueError(f"a median of {median} ms")
    return Figure(median, float(low), float(high), tuple(map(float, samples)))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _attention(engine: Mapping[str, Any]) -> str | None:
    if engine.get("iattention") is None:
        return None
    causal, masked = int(engine["iattention_causal"]), int(engine["iattention_masked"])
    kinds = {"causal": causal, "masked": masked, "full": int(engine["iattention"]) - causal - masked}
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "none"


def _accuracy(verify: Mapping[str, Any] | None) -> Accuracy | None:
    if not verify or not verify["cases"]:
        return None
    worst = worst_case(dict(verify))
    own = (worst["yardsticks"].get("pytorch") or {}).get("relative_error")
    return Accuracy(
        executed=str(verify.get("executed", "?")),
        case=str(worst["name"]),
        relative_error=worst["relative_error"],
        tolerance=worst["tolerance"],
        share=error_share(worst),
        pytorch_share=None if own is None else error_share({**worst, "relative_error": own}),
        passed=bool(verify["passed"]),
    )


def _cost(quality: Mapping[str, Any]) -> Cost | None:
    cost = quality.get("cost")
    if not cost:
        return None
    rise = cost["increase"]
    numbers = [cost["perplexity"]["value"], cost["reference_perplexity"]["value"], *(rise[k] for k in rise)]
    if None in numbers:
        return None
    perplexity, reference = map(float, numbers[:2])
    increase, low, high = (float(rise[name]) for name in ("value", "low", "high"))
    passed = bool(quality["passed"])
    return Cost(perplexity, reference, increase, low, high, int(cost["tokens"]), str(cost["text_sha256"]), passed)


def _reason(report: Mapping[str, Any]) -> str:
    """Why a report has no figure."""
    config = report["config"]
    if failure := report.get("failure"):
        return "{stage}: {kind}: {message}".format(**failure)
    if report["status"] == "unavailable":
        return str(report.get("unavailable") or next(iter(report.get("notes") or []), "no reason was recorded"))
    if report["status"] == "not_executed":
        alone = ", and its graph alone was verified" if verified_by(report) == GRAPH else ""
        return f"no GPU could run it: nothing was timed{alone}"
    if config.get("until"):
        return f"stopped after the stage asked for (until={config['until']})"
    if not times_count(report):
        return "no verification that it passed, so its times do not count"
    return "nothing was to be timed (benchmark=none)"
