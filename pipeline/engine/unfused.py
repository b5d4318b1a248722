"""Native attention layers for which TensorRT has no fused kernel: found, said, and refused where that was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from passes.errors import RunError
from passes.tensorrt.attention import NativeLayer
from passes.tensorrt.fused_kernels import in_short
from pipeline.engine.sections import Attention, Engine, Unfused


def unfused(made: Iterable[NativeLayer]) -> tuple[Unfused, ...]:
    """Those of ``made``, by form, in the order in which each form was first met."""
    found: dict[tuple[str, str], list[str]] = {}
    for layer in made:
        if layer.why_unfused is not None:
            found.setdefault((str(layer.form), layer.why_unfused), []).append(layer.name)
    return tuple(Unfused(tuple(names), form, reason) for (form, reason), names in found.items())


def notes(found: Iterable[Unfused], of: int, target: str) -> Iterator[str]:
    """A line a form, of an engine of ``of`` native layers that is built for ``target``."""
    where = target if target.startswith("ahead of time") else f"on {target}"
    for each in found:
        yield (
            f"{len(each.layers)} of {of} attention layers have no fused kernel {where}: {each.form} "
            f"({in_short(each.reason)})"
        )


def refuse(engines: Mapping[str, Engine], attention: Mapping[str, Attention]) -> None:
    """Raises :class:`RunError` of kind ``unfused`` that names the layers, if there are any, or the attention that is no
    layer."""
    for name, program in attention.items():
        if written_out := program.summary.written_out:
            raise RunError(
                "unfused",
                f"strategy.require_fused=true: the model writes its attention out itself, so {name}.trt would have no "
                f"layer for {', '.join(written_out)}",
            )
    for name, engine in engines.items():
        for each in engine.unfused:
            raise RunError(
                "unfused",
                f"strategy.require_fused=true: no fused kernel for {', '.join(each.layers)} of {name}.trt: "
                f"{each.form} ({in_short(each.reason)})",
            )
