"""Makes the weights of a loaded model smaller: which layers, in what blocks, and rounded how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from passes.errors import UserError
from passes.precision import FEW_BITS, PRECISIONS, FewBits, Kind, number_type
from passes.quantised import LARGEST, QuantisedWeight, to_nearest
from pipeline.model import calibration, few_bits, gptq
from pipeline.model.load import LoadedModel
from pipeline.model.load import load as load_wide

if TYPE_CHECKING:
    from pipeline.config.quantize import QuantizeConfig
    from pipeline.config.schema import ModelConfig

TABLE: Kind = "int8"
"""What an embedding becomes that is tied to a quantised product with the vocabulary, together with that product,
whatever the other layers become: its rows are the model's input, and one table is read by both."""


def load(
    config: ModelConfig,
    precision: str,
    asked: QuantizeConfig,
    device: torch.device,
    seed: int,
    progress: Callable[[str], None],
) -> LoadedModel:
    """:func:`pipeline.model.load.load` at ``precision``, which may be one of few bits; raises as that does, and as
    :func:`quantised`."""
    within, few = number_type(precision, asked.base), FEW_BITS.get(precision)
    loaded = load_wide(config, within, device, seed, progress, None if few is None else few.kind)
    if few is not None and loaded.came_as is not None:
        _check_came(loaded, precision, few.kind, asked)
        return _with_rows(loaded, asked, seed) if few.rounds_rows else loaded
    return quantised(loaded, precision, within, asked, seed, progress)


def _with_rows(loaded: LoadedModel, asked: QuantizeConfig, seed: int) -> LoadedModel:
    """``loaded``, whose weights came quantised, with scales of rows, measured where it came without."""
    without = {name: loaded.model.get_submodule(name) for name, each in loaded.quantised.items() if not each.row_scale}
    if not without:
        return loaded
    layers = {name: layer for name, layer in without.items() if isinstance(layer, nn.Linear)}
    largest = calibration.largest_rows(loaded, layers, calibration.samples(loaded, asked.calibration, seed))
    made = {name: replace(loaded.quantised[name], row_scale=each / LARGEST["e4m3"]) for name, each in largest.items()}
    few_bits.put(loaded.model, made)
    said = f"{loaded.came_as} has no scales of rows: they were measured on text"
    return replace(loaded, quantised={**loaded.quantised, **made}, notes=(*loaded.notes, said))


def _check_came(loaded: LoadedModel, precision: str, kind: Kind, asked: QuantizeConfig) -> None:
    """Refuse what cannot be had of weights that came quantised."""
    if kind == "e4m3":
        _refuse_without_e4m3(precision, loaded.model.device)
    if not loaded.quantised:
        raise UserError(
            f"precision={precision}: {loaded.source} comes as {loaded.came_as}, which no engine holds as {kind}; "
            f"set precision=fp16 or bf16, which dequantise it"
        )
    for key in ("method", "block", "without"):
        if value := getattr(asked, key):
            raise UserError(f"quantize.{key}={value}: {loaded.source} comes as {loaded.came_as}; leave it out")


def quantised(
    loaded: LoadedModel,
    precision: str,
    within: str,
    asked: QuantizeConfig,
    seed: int,
    progress: Callable[[str], None],
) -> LoadedModel:
    """``loaded`` with weights of ``precision``, put into its model; as it is where that has none of few bits, or it
    came with weights of few bits.  ``within``: what all else is computed in.

    Raises :class:`UserError` where there is nothing to quantise, a pattern names nothing, or blocks do not divide.
    """
    few = FEW_BITS.get(precision)
    if few is None or loaded.quantised:
        return loaded
    if few.kind == "e4m3":
        _refuse_without_e4m3(precision, loaded.model.device)
    layers = _chosen(loaded.model, precision, asked.without)
    tables = _tables(loaded.model, layers)
    others = {name: layer for name, layer in layers.items() if name not in tables}
    block = _block(few, others, asked.block)
    progress(f"{precision}: {len(layers)} layers of {loaded.name}")
    dtype = PRECISIONS[within].dtype
    made: dict[str, QuantisedWeight] = {}
    for name, table in tables.items():
        made |= dict.fromkeys((name, table), _rounded(precision, name, layers[name].weight, TABLE, None, dtype))
    notes = _notes(few, block, asked.block, tables)

    def nearest(name: str, weight: torch.Tensor) -> QuantisedWeight:
        return _rounded(precision, name, weight, few.kind, block, dtype)

    if few.calibrated(asked.method):
        usual = calibration.SAMPLES_OF_GPTQ if asked.method == "gptq" else calibration.SAMPLES
        tokens = calibration.samples(loaded, asked.calibration, seed, usual)
    if asked.method == "awq":
        from pipeline.model.awq import widened

        for name, (weight, factors) in widened(loaded.model, others, block, tokens.split(1)).items():
            made[name] = replace(nearest(name, weight), row_factors=factors)
    elif asked.method == "gptq":
        made |= gptq.made_up_for(loaded.model, others, tokens, nearest, dtype)
        if apart := [name for name in others if name not in made]:
            made |= {name: nearest(name, others[name].weight) for name in apart}
            notes.append(
                f"{len(apart)} of {len(others)} layers do not multiply every row of a text and are rounded to nearest, "
                f"{apart[0]} first"
            )
    else:
        made |= {name: nearest(name, layer.weight) for name, layer in others.items()}
    if few.rounds_rows:
        largest = calibration.largest_rows(loaded, others, tokens)
        made |= {name: replace(made[name], row_scale=each / LARGEST["e4m3"]) for name, each in largest.items()}
    few_bits.put(loaded.model, made)
    return replace(loaded, quantised=made, notes=(*loaded.notes, *notes))


def _refuse_without_e4m3(precision: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):  # Ada is the first that has it
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError(
            f"precision={precision}: {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no "
            f"E4M3, which begins with 8.9; set precision=int8_weights"
        )


def _rounded(
    precision: str, name: str, weight: torch.Tensor, kind: Kind, block: int | None, dtype: torch.dtype
) -> QuantisedWeight:
    try:
        return to_nearest(weight, kind, block, dtype)
    except ValueError as error:
        raise UserError(f"precision={precision}: {name}: {error}; leave it out by quantize.without") from None


def _notes(few: FewBits, block: int | None, asked: int | None, tables: dict[str, str]) -> list[str]:
    """What the reader must know of what was not asked for in so many words."""
    notes = []
    if block is not None and asked is None and block != few.blocks[0]:
        notes.append(f"{few.name} in blocks of {block}, not {few.blocks[0]}, which do not divide every layer's input")
    if few.kind != TABLE:
        notes += [f"{table}, the table that {name} shares, is held in {TABLE}" for name, table in tables.items()]
    return notes


def _chosen(model: nn.Module, precision: str, without: list[str]) -> dict[str, nn.Linear]:
    """The linear layers of ``model``, by name, but for those that a pattern of ``without`` names."""
    every = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    if not every:
        raise UserError(
            f"precision={precision}: {type(model).__name__} has no linear layers, and others are not quantised"
        )
    for pattern in without:
        if not any(_names(pattern, name) for name in every):
            first, *_, last = [*every, *every]
            raise UserError(f"quantize.without={pattern}: names no linear layer; they are {first} to {last}")
    chosen = {n: each for n, each in every.items() if not any(_names(pattern, n) for pattern in without)}
    if not chosen:
        raise UserError(
            f"quantize.without=[{','.join(without)}]: leaves no layer to quantise; set precision=fp16 or bf16"
        )
    return chosen


def _names(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is ``name`` or the end of it, behind a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _block(few: FewBits, layers: dict[str, nn.Linear], asked: int | None) -> int | None:
    if not few.blocks:
        return None
    for block in few.blocks if asked is None else (asked,):
        misfits = [name for name, layer in layers.items() if layer.in_features % block]
        if not misfits:
            return block
    fitting = [each for each in few.blocks if not any(layer.in_features % each for layer in layers.values())]
    remedy = f"set quantize.block={fitting[0]}" if fitting else "leave it out by quantize.without"
    raise UserError(
        f"precision={few.name}: blocks of {block} do not divide the input {layers[misfits[0]].in_features} of "
        f"{misfits[0]}; {remedy}"
    )


def _tables(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, str]:
    """Linear layer -> embedding, where the two have one weight."""
    found = {id(each.weight): name for name, each in model.named_modules() if isinstance(each, nn.Embedding)}
    return {name: found[id(layer.weight)] for name, layer in layers.items() if id(layer.weight) in found}
