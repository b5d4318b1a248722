"""``on_cpu="torch"``: the graph that an engine was built from, made again from the run's settings and run in PyTorch.

Nothing is stored for it: the weights come from their source and the graph from them.  Both must be the run's own, so
what answers here is what was verified there, up to the rounding of another machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from passes.errors import UserError
from passes.precision import PRECISIONS
from pipeline.deploy.described import Described, graph_hash
from pipeline.deploy.writers import CachedWriter, PrefixWriter, Writer
from pipeline.engine import programs
from pipeline.engine.session import GraphSession
from pipeline.model import quantise
from pipeline.verify.arithmetic import on_cpu
from pipeline.verify.candidate import graph_generator, vocabulary_of

if TYPE_CHECKING:
    from pipeline.model.load import LoadedModel

CPU = torch.device("cpu")


def writer(described: Described, progress: Callable[[str], None]) -> Writer:
    """The run's graphs as a writer; raises :class:`UserError` where weights or graphs are others than the run's."""
    config = described.run_config
    if described.model.sha256 is None:
        raise UserError("on_cpu=torch: the run's weights are random, and another machine draws others")
    loaded = quantise.load(config.model, config.precision, config.quantize, CPU, config.seed, progress)
    if loaded.sha256 != described.model.sha256:
        raise UserError(
            f"on_cpu=torch: {loaded.source} has weights of sha256 {loaded.sha256}, and the run's were of "
            f"{described.model.sha256}"
        )
    cache = programs.cache_of(loaded.model, config.cache, config.shape, config.benchmark.generate)
    cache, parts = programs.with_rings(loaded.model, config.model, config.shape, cache, loaded.quantised)
    made: dict[str, programs.Program] = {}
    for name, trace in parts.items():
        progress(f"tracing {name}")
        made[name] = programs.rewritten(trace(), config.strategy)
        if graph_hash(str(made[name].program.graph)) != described.graphs.get(name):
            here = ", ".join(f"{key} {value}" for key, value in _versions(described).items())
            raise UserError(f"on_cpu=torch: {name} becomes another graph here than in the run, which had {here}")
    if cache is not None:
        generator = graph_generator(made, cache, vocabulary_of(loaded), config.number_type)
        return CachedWriter(generator, config.shape)
    return _without_cache(made["engine"], loaded, described)


def _without_cache(program: programs.Program, loaded: LoadedModel, described: Described) -> Writer:
    config, module = described.run_config, program.program.module()
    names = [spec.name for spec in program.inputs]

    def results(**inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (module(**inputs),)

    session = GraphSession(results, tuple(names), on_cpu(config.number_type))
    every = config.model.logits == "all" and "last" not in names
    dtype = PRECISIONS[config.number_type].dtype
    return PrefixWriter(session, names, config.shape, every, vocabulary_of(loaded), dtype, CPU)


def _versions(described: Described) -> dict[str, str | None]:
    made = described.environment
    return {"torch": made.torch, "transformers": made.transformers}
