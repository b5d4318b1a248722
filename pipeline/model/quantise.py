"""Makes the weights of a loaded model smaller: which layers, in what blocks, and rounded how."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from passes.errors import RunError, UserError
from passes.precision import FEW_BITS, PRECISIONS, FewBits, Kind, number_type
from passes.quantised import LARGEST, QuantisedWeight, to_nearest
from pipeline.model import few_bits
from pipeline.model.load import LoadedModel
from pipeline.model.load import load as load_wide
from pipeline.model.text import tokens_for

if TYPE_CHECKING:
    from pipeline.config.quantize import CalibrationConfig, QuantizeConfig
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
    largest = _largest_rows(loaded, layers, _texts(loaded, asked.calibration, seed))
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
    if asked.method == "awq":
        from pipeline.model.awq import widened

        found = widened(loaded.model, others, block, _texts(loaded, asked.calibration, seed))
        for name, (weight, factors) in found.items():
            made[name] = replace(_rounded(precision, name, weight, few.kind, block, dtype), row_factors=factors)
    else:
        for name, layer in others.items():
            made[name] = _rounded(precision, name, layer.weight, few.kind, block, dtype)
    if few.rounds_rows:
        largest = _largest_rows(loaded, others, _texts(loaded, asked.calibration, seed))
        made |= {name: replace(made[name], row_scale=each / LARGEST["e4m3"]) for name, each in largest.items()}
    few_bits.put(loaded.model, made)
    return replace(loaded, quantised=made, notes=(*loaded.notes, *_notes(few, block, asked.block, tables)))


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


def _texts(loaded: LoadedModel, asked: CalibrationConfig, seed: int) -> Iterable[torch.Tensor]:
    """Tokens [1, length], ``asked.samples`` times."""
    seed = seed if asked.seed is None else asked.seed
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or asked.length
    length = min(asked.length, limit)
    if asked.text is None or loaded.tokenizer is None:
        rows = tokens_for(loaded, asked.samples, length, seed)
    else:
        rows = _of_file(asked.text, loaded, asked.samples, length, seed)
    return rows.split(1)


def _of_file(path: str, loaded: LoadedModel, samples: int, length: int, seed: int) -> torch.Tensor:
    """Pieces of the text in ``path`` that do not overlap; raises :class:`UserError` where it has not as many."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"quantize.calibration.text={path}: cannot be read as UTF-8 text ({error})") from None
    assert loaded.tokenizer is not None
    tokens = torch.tensor(loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    pieces = len(tokens) // length
    if pieces < samples:
        raise UserError(
            f"quantize.calibration.text={path}: holds {len(tokens)} tokens, and samples={samples} of length={length} "
            f"are {samples * length}; name a longer text, or ask for less"
        )
    chosen = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[:samples]
    return tokens[: pieces * length].reshape(pieces, length)[chosen].to(loaded.model.device)


def _largest_rows(loaded: LoadedModel, layers: dict[str, nn.Linear], texts: Iterable[torch.Tensor]) -> dict[str, float]:
    """The largest magnitude in the rows of each layer, over ``texts``, of the model as it was loaded."""
    found = dict.fromkeys(layers, torch.finfo(torch.float16).tiny)

    def look(name: str, given: tuple[torch.Tensor, ...]) -> None:
        found[name] = max(found[name], float(given[0].abs().max()))

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda layer, given: look(name, given)

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for tokens in texts:
                loaded.model(input_ids=tokens, use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    if not all(map(math.isfinite, found.values())):
        worst = next(name for name, each in found.items() if not math.isfinite(each))
        raise RunError("precision", f"the rows of {worst} are not finite on the text of quantize.calibration")
    return found
