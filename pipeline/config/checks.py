"""Refuses settings that contradict each other or the model, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from passes.errors import UserError
from passes.precision import FEW_BITS, PRECISIONS
from pipeline.config.choices import (
    ASSUMPTIONS,
    ATTENTIONS,
    BACKEND_OPTIONS,
    BACKENDS,
    CACHES,
    COMPILE_MODES,
    EXPORT_FORMATS,
    INPUTS,
    LOGGED_MODELS,
    OPTIONAL_PASSES,
    STAGES,
    STRATEGIES,
)
from pipeline.config.lengths import GRANULE, positions
from pipeline.config.quantize import check_quantize
from pipeline.config.refusals import at_least, one_of
from pipeline.config.schema import Config, ModelConfig, ShapeConfig, StrategyConfig
from pipeline.config.verification import check_verification
from pipeline.host import gguf_header


def check(config: Config) -> None:
    """Refuse settings that contradict each other; raises :class:`UserError` naming key, value and remedy."""
    one_of("precision", config.precision, (*PRECISIONS, *FEW_BITS))
    if config.until is not None:
        one_of("until", config.until, STAGES)
    _check_model(config.model)
    _check_strategy(config.strategy)
    _check_assumptions(config.strategy, config.model)
    _check_backend(config)
    check_quantize(config.precision, config.quantize, config.backend.name, config.strategy.name)
    _check_profile(config)
    _check_cache(config)
    _check_lengths(config)
    at_least("seed", config.seed, 0)
    check_verification(config.verify)
    if not config.output:
        raise UserError("output=: name a folder for the runs, for example output=outputs")
    if config.store.folder == "":
        raise UserError("store.folder=: name a folder for finished engines, or null for the user's cache")
    if config.store.limit_gib <= 0:
        raise UserError(f"store.limit_gib={config.store.limit_gib}: must be above 0; store.enabled=false keeps nothing")
    for name in config.export.format:
        one_of("export.format", name, EXPORT_FORMATS)
        if config.export.format.count(name) > 1:
            raise UserError(f"export.format={listed(config.export.format)}: name {name} once")
    if not config.tracking.uri:
        raise UserError("tracking.uri=: name the MLflow store, for example tracking.uri=sqlite:///mlflow.db")
    one_of("tracking.log_model", config.tracking.log_model, LOGGED_MODELS)
    if config.sweep.timeout_minutes <= 0:
        raise UserError(f"sweep.timeout_minutes={config.sweep.timeout_minutes}: must be above 0")
    if config.sweep.builders < 1:
        raise UserError(f"sweep.builders={config.sweep.builders}: must be at least 1")


def _check_model(model: ModelConfig) -> None:
    one_of("model.weights", model.weights, ("pretrained", "random"))
    one_of("model.logits", model.logits, ("last", "all"))
    for name in model.inputs:
        one_of("model.inputs", name, INPUTS)
    if "input_ids" not in model.inputs or len(set(model.inputs)) != len(model.inputs):
        raise UserError(f"model.inputs={model.inputs}: must name input_ids, and each input once")
    if "last" in model.inputs and len(model.inputs) > 2:
        raise UserError(f"model.inputs={listed(model.inputs)}: last goes with input_ids alone")
    if model.weights == "random" and not model.path and "model_type" not in model.architecture:
        raise UserError("model.weights=random: needs model.architecture with its model_type, as conf/model/*.yaml has")
    if model.weights == "pretrained" and not model.path and not model.source:
        raise UserError("model.path=null: name the folder of the model, model.path=DIR")
    if model.path is not None:
        _check_path(Path(model.path), f"model.path={model.path}")


def _check_path(path: Path, setting: str) -> None:
    if gguf_header.alone(path) is not None:
        return
    if not path.is_dir():
        what = "is no folder and no .gguf file" if path.is_file() else "no such folder"
        raise UserError(f"{setting}: {what}; name a Hugging Face model folder (with config.json) or a GGUF file")
    if not (path / "config.json").is_file():
        several = len(list(path.glob("*.gguf")))
        what = f"holds no config.json and {several} GGUF files; name one of them" if several else "holds no config.json"
        raise UserError(f"{setting}: {what}" + ("" if several else "; name a Hugging Face causal LM folder"))


def _check_strategy(strategy: StrategyConfig) -> None:
    one_of("strategy", strategy.name, STRATEGIES)
    allowed = STRATEGIES[strategy.name]
    if strategy.unproven is not None and strategy.unproven not in allowed:
        takes = f"allowed are {', '.join(allowed)}" if allowed else "it takes none; leave it out"
        owners = [name for name, values in STRATEGIES.items() if strategy.unproven in values]
        hint = f" (it belongs to strategy={owners[0]})" if owners else ""
        raise UserError(f"strategy.unproven={strategy.unproven}: not for strategy={strategy.name}{hint}; {takes}")
    for name in strategy.without:
        one_of("strategy.without", name, OPTIONAL_PASSES)
    if strategy.require_fused is not None and strategy.name in ("decompose", "upstream"):
        has = "writes attention out" if strategy.name == "decompose" else "leaves its layers to Torch-TensorRT"
        raise UserError(
            f"strategy.require_fused={strategy.require_fused}: strategy={strategy.name} {has}; leave it out"
        )
    if strategy.without and strategy.name == "upstream":
        raise UserError("strategy.without: strategy=upstream runs none of the passes; leave it out")
    if allowed and strategy.unproven is None:
        raise UserError(f"strategy.unproven=null: strategy={strategy.name} needs one of {', '.join(allowed)}")


def _check_assumptions(strategy: StrategyConfig, model: ModelConfig) -> None:
    if not STRATEGIES[strategy.name]:  # it proves nothing, or keeps every mask
        for key, value in (
            ("assume", listed(strategy.assume) if strategy.assume else None),
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
        one_of("strategy.assume", condition, ASSUMPTIONS)
        if (about := ASSUMPTIONS[condition]) not in model.inputs:
            raise UserError(
                f"strategy.assume={condition}: is about {about}, which model.inputs={listed(model.inputs)} lacks; "
                f"add it, or leave the assumption out"
            )


def listed(values: list[str]) -> str:
    """``values`` as the command line takes them."""
    return f"[{','.join(values)}]"


def _check_backend(config: Config) -> None:
    backend = config.backend
    one_of("backend", backend.name, BACKENDS)
    for key, owners in BACKEND_OPTIONS.items():
        if getattr(backend, key) is not None and backend.name not in owners:
            takes = [name for name, who in BACKEND_OPTIONS.items() if backend.name in who]
            raise UserError(
                f"backend.{key}={getattr(backend, key)}: an option of backend={owners[0]}, not of "
                f"backend={backend.name}, which takes {', '.join(takes)}"
            )
    if backend.name == "torch_compile":
        one_of("backend.mode", backend.mode, COMPILE_MODES)
    if backend.attention is not None:
        one_of("backend.attention", backend.attention, ATTENTIONS)
    if backend.optimization_level is not None:
        one_of("backend.optimization_level", backend.optimization_level, range(6))
    if backend.workspace_gib is not None and backend.workspace_gib <= 0:
        raise UserError(f"backend.workspace_gib={backend.workspace_gib}: must be above 0")
    if backend.aux_streams is not None and backend.aux_streams < 0:
        raise UserError(f"backend.aux_streams={backend.aux_streams}: must be 0 or more")
    if backend.plugin_library is not None and not Path(backend.plugin_library).is_file():
        raise UserError(f"backend.plugin_library={backend.plugin_library}: no such file; name the plugin's library")
    if backend.name != "tensorrt" and config.until in ("export", "strategy", "lower", "interpret", "build"):
        raise UserError(f"until={config.until}: a stage of backend=tensorrt; backend={backend.name} has none")


def _check_cache(config: Config) -> None:
    cache, generate = config.cache, config.benchmark.generate
    one_of("cache", cache.name, CACHES)
    if config.backend.name not in CACHES[cache.name]:
        has = ", ".join(name for name, owners in CACHES.items() if config.backend.name in owners)
        raise UserError(f"cache={cache.name}: backend={config.backend.name} has none such; it takes {has}")
    _check_chunk(config)
    if cache.capacity is not None:
        if cache.name in ("none", "dynamic"):
            raise UserError(f"cache.capacity={cache.capacity}: cache={cache.name} has no capacity; leave it out")
        if cache.capacity < config.shape.max:
            raise UserError(f"cache.capacity={cache.capacity}: holds no prompt of shape.max={config.shape.max} tokens")
    if cache.name != "none" and config.backend.name == "tensorrt":
        one_of(f"strategy (with cache={cache.name})", config.strategy.name, ("detect_causal", "lowering", "decompose"))
        for name in ("position_ids", "last"):
            if name in config.model.inputs:
                raise UserError(
                    f"model.inputs={listed(config.model.inputs)}: with cache={cache.name} positions are those of the "
                    f"cache; leave {name} out"
                )
    if "last" in config.model.inputs and config.model.logits != "last" and not config.generates:
        raise UserError(f"model.logits={config.model.logits}: with last in model.inputs set model.logits=last")
    if generate is None:
        return
    at_least("benchmark.min_generations", config.benchmark.min_generations, 3)
    at_least("benchmark.generate.output_length", generate.output_length, 2)
    total = generate.input_length + generate.output_length
    asked = f"benchmark.generate.input_length={generate.input_length} output_length={generate.output_length}"
    limit = positions(config.model.path, config.model.architecture)
    if limit is not None and total > limit:  # before what would have it made longer still
        raise UserError(f"{asked}: with the prompt {total} tokens, above max_position_embeddings={limit}")
    fits = config.shape.kind == "dynamic" or config.runs_at_one_length
    if not config.runs_at_one_length and (fits or cache.name != "none"):
        within("benchmark.generate.input_length", generate.input_length, config.shape)
    if cache.name == "none" and (not fits or total - 1 > config.shape.max):
        raise UserError(
            f"{asked}: without a cache every length up to {total - 1} runs as a prompt; "
            f"set shape=dynamic shape.max={total - 1}, or model.inputs=[input_ids,last] with shape=static"
        )
    if generate.batch != config.shape.batch:
        raise UserError(
            f"benchmark.generate.batch={generate.batch}: the profile has shape.batch={config.shape.batch}; "
            f"make them equal"
        )
    if cache.capacity is not None and total > cache.capacity:
        raise UserError(f"{asked}: {total} tokens in all, above cache.capacity={cache.capacity}")


def _check_chunk(config: Config) -> None:
    cache = config.cache
    if cache.chunk is None:
        return
    asked = f"cache.chunk={cache.chunk}"
    if cache.name != "in_engine" or config.backend.name != "tensorrt":
        raise UserError(
            f"{asked}: backend={config.backend.name} cache={cache.name} runs no prompt in chunks; "
            "use backend=tensorrt cache=in_engine, or leave it out"
        )
    if config.shape.kind == "static":
        raise UserError(f"{asked}: prompts of any length run in chunks, and shape=static has one; use shape=dynamic")
    if cache.chunk < GRANULE or cache.chunk % GRANULE:
        raise UserError(f"{asked}: must be a multiple of {GRANULE} tokens, and at least {GRANULE}")
    if cache.capacity is not None and cache.chunk > cache.capacity:
        raise UserError(f"{asked}: above cache.capacity={cache.capacity}")
    if cache.capacity is None and cache.chunk > config.shape.max:
        raise UserError(f"{asked}: above shape.max={config.shape.max}, the longest prompt")


def _check_profile(config: Config) -> None:
    shape = config.shape
    one_of("shape", shape.kind, ("dynamic", "static"))
    at_least("shape.batch", shape.batch, 1)
    at_least("shape.min", shape.min, 1)
    at_least("shape.max", shape.max, 1)
    if shape.min > shape.max:
        raise UserError(f"shape.min={shape.min} shape.max={shape.max}: the shortest length is above the longest")
    if not shape.min <= shape.opt <= shape.max:
        raise UserError(f"shape.opt={shape.opt}: must lie between shape.min={shape.min} and shape.max={shape.max}")
    if shape.kind == "static" and shape.min != shape.max:
        raise UserError(f"shape.min={shape.min}: a static shape has one length; set shape.max={shape.max} only")
    if shape.kind == "dynamic" and shape.min == shape.max:
        raise UserError(f"shape.min={shape.min}: equals shape.max; use shape=static shape.max={shape.max}")
    if shape.kind == "static" and shape.exact:
        raise UserError(f"shape.exact={shape.exact}: a static shape has one length; leave it out, or use shape=dynamic")
    for length in shape.exact:
        within("shape.exact", length, shape)
        if shape.exact.count(length) > 1:
            raise UserError(f"shape.exact={shape.exact}: name {length} once")
    limit = positions(config.model.path, config.model.architecture)
    if limit is not None and shape.max > limit:
        raise UserError(f"shape.max={shape.max}: above the model's max_position_embeddings={limit}")


def _check_lengths(config: Config) -> None:
    shape = config.shape
    for item in config.benchmark.shapes:
        within("benchmark.shapes.input_length", item.input_length, shape)
        if item.batch != shape.batch:
            raise UserError(
                f"benchmark.shapes.batch={item.batch}: the profile has shape.batch={shape.batch}; make them equal"
            )
    for length in config.verify.lengths or []:
        within("verify.lengths", length, replace(shape, min=1) if config.runs_at_one_length else shape)
    at_least("benchmark.min_iterations", config.benchmark.min_iterations, 10)


def within(key: str, length: int, shape: ShapeConfig) -> None:
    if not shape.min <= length <= shape.max:
        raise UserError(f"{key}={length}: outside the profile shape.min={shape.min}..shape.max={shape.max}")
