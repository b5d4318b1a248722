"""Settings that have no part in a run: refused where they were typed for it, left out of what tells jobs apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from passes.errors import UserError
from pipeline.config.quantize import idle_of_quantize
from pipeline.config.schema import Config


def idle(config: Config) -> dict[str, str]:
    """Settings, or whole groups, that change nothing in the run of ``config`` -> why."""
    model, backend, found = config.model, config.backend.name, {}
    if backend != "tensorrt":
        found["strategy"] = f"backend={backend} runs the model as it is"
        found["shape.exact"] = f"backend={backend} has no optimization profiles"
        found["export"] = f"backend={backend} builds no engine"
        if config.cache.name != "none" and config.benchmark.generate is None:
            found["cache"] = f"backend={backend} generates nothing here (benchmark=generate does)"
    elif not config.reaches("write"):
        found["export"] = f"until={config.until} stops before anything is exported"
    if (chunk := config.cache.chunk) is not None:
        found |= dict.fromkeys(("shape.exact", "shape.opt"), f"prompts of any length run in chunks of {chunk} tokens")
    found |= idle_of_quantize(config.precision, config.quantize, config.cache.name != "none")
    if config.benchmark.generate is None:
        found["benchmark.min_generations"] = "nothing is generated (benchmark=generate does)"
    if not config.judges_quality:
        why = "no quality is judged here (verify.quality=true does)"
        found |= dict.fromkeys(("verify.text", "verify.max_perplexity_increase"), why)
    if model.path is not None:
        found |= dict.fromkeys(("model.source", "model.revision"), "the model is that of model.path")
    elif model.weights == "random":
        found |= dict.fromkeys(("model.source", "model.revision"), "model.weights=random fetches nothing")
    return found


def why_idle(config: Config, key: str) -> str | None:
    """Why the setting ``key`` changes nothing; None where it has its part."""
    return next((why for name, why in idle(config).items() if f"{key}.".startswith(f"{name}.")), None)


def refuse_idle(typed: Mapping[str, str], configs: Sequence[Config], sweep: bool) -> None:
    """``typed``: settings of the command line, by key.  Raises :class:`UserError` for one that has no part in any of
    the runs ``configs``."""
    for key, text in typed.items():
        if key.startswith("sweep.") and not sweep:
            raise UserError(f"{text}: is about the jobs of a sweep; add -m, or leave it out")
        reasons = [why_idle(config, key) for config in configs]
        if reasons and all(reasons):
            raise UserError(f"{text}: has no part in {'any of the jobs' if sweep else 'this run'}, since {reasons[0]}; "
                            f"leave it out")  # fmt: skip
