"""What the report says of a benchmark.  Times in milliseconds, memory in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.host.gpu import GpuState


@dataclass(frozen=True)
class Summary:
    """Samples in five numbers, all in their unit, and how many there were."""

    median: float
    mad: float
    """Median absolute deviation from the median, unscaled."""
    p05: float | None
    p95: float | None
    """Null while fewer than ten samples are expected beyond it."""
    n: int
    ci95: tuple[float, float]
    """Bootstrap 95 % interval [low, high] of the median."""


@dataclass(frozen=True)
class Warmup:
    """What ran before anything was timed."""

    iterations: int
    seconds: float
    settled: bool


@dataclass(frozen=True)
class GpuStates:
    """The card before and after a measurement."""

    before: GpuState
    after: GpuState


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What every timed piece of work has."""

    batch: int
    device_ms: Summary
    enqueue_ms: Summary
    launch_bound: bool
    """The host, not the device, sets the pace."""
    floor_ms: float | None
    """What this card cannot do it below; null where the model's cost is not known."""
    roofline_fraction: float | None
    """``floor_ms`` over the median of ``device_ms``."""
    tokens_per_s: float
    cuda_graph: bool


@dataclass(frozen=True, kw_only=True)
class Watched(Timed):
    """Timed by itself, with the card watched meanwhile."""

    input_length: int
    host_ms: Summary
    drift: bool
    tainted: tuple[str, ...]
    """What speaks against the numbers, one sentence each."""
    warmup: Warmup
    gpu: GpuStates


@dataclass(frozen=True, kw_only=True)
class Prefill(Watched):
    """One forward pass over whole prompts."""


@dataclass(frozen=True, kw_only=True)
class Generate(Watched):
    """A whole generation: the prompt, then ``output_length`` new tokens."""

    output_length: int
    ttft_ms: Summary
    """Device time to the first token."""
    tpot_ms: Summary
    """Device time of each later one, a generation's mean."""


@dataclass(frozen=True)
class CacheLength:
    """Tokens that a decode step sees, its own included, at the first and the last step."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class DecodeStep(Timed):
    """One step of the generation."""

    cache_length: CacheLength


@dataclass(frozen=True)
class Kernels:
    """Attention's operators and kernels, as the profiler saw them."""

    prefill: tuple[str, ...]
    decode: tuple[str, ...]


@dataclass(frozen=True)
class Ceilings:
    """What the card itself reaches: the roof over every measurement."""

    copy_gb_per_s: float
    """Device-to-device copy, bytes read plus bytes written, in 1e9 bytes per second."""
    matmul_tflops: dict[str, float]
    """Precision -> 1e12 operations per second of a square product on random data."""


@dataclass(frozen=True)
class Memory:
    """Device memory in bytes: used before, at the peak, and all there is."""

    before_bytes: int
    peak_bytes: int
    total_bytes: int
    context_bytes: int | None = None
    """Of these, used before the model was loaded: CUDA's own."""
    cache_bytes: int | None = None
    """An engine's KV cache."""
    activation_bytes: int | None = None
    """What engines have to run in."""


@dataclass(frozen=True)
class Benchmark:
    """What was timed; null where it was not asked for."""

    prefill: Prefill | None = None
    """Of ``benchmark.shapes`` the first, the headline."""
    prefill_shapes: tuple[Prefill, ...] = ()
    """The others."""
    generate: Generate | None = None
    decode: DecodeStep | None = None
    kernels: Kernels | None = None
    ceilings: Ceilings | None = None
    memory: Memory | None = None
    tokens: str | None = None
    """What the prompts were: ``real text``, or ``random, seeded``."""
