"""Reads a folder of quantised safetensors: which format it is in, and the weights that it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.errors import UserError, whole_message
from passes.precision import Kind
from passes.quantised import QuantisedWeight
from pipeline.model.stored import awq, compressed_tensors, fp8, gptq, modelopt
from pipeline.model.stored.format import Format, Settings
from pipeline.model.stored.grid import Grid
from pipeline.model.stored.held import held

_FORMATS: dict[str, Callable[[Settings], Format]] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "modelopt": modelopt.read,
    "fp8": fp8.read,
}
_OF_MODELOPT = "hf_quant_config.json"
_SMALL = {"I8", "U8", "F8_E4M3"}
"""What safetensors calls the types of weights that are no weights without their scales."""


@dataclass(frozen=True)
class Stored:
    """Quantised weights that were not read yet."""

    format: Format
    files: tuple[Path, ...]


def format_of(described: Mapping[str, Any], folder: Path | None, origin: str) -> Format | None:
    """The format that a config.json, or ModelOpt's file in its folder, names; None where weights are plain.

    Raises :class:`UserError`, beginning with ``origin``, for a format that is not read, or not in that form.
    """
    settings = described.get("quantization_config")
    if not settings and folder is not None and (folder / _OF_MODELOPT).is_file():
        try:
            settings = json.loads((folder / _OF_MODELOPT).read_text(encoding="utf-8"))["quantization"]
            settings = {**settings, "quant_method": "modelopt"} if settings.get("quant_algo") else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{origin}: cannot read {_OF_MODELOPT} ({whole_message(error)})") from None
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise UserError(
            f"{origin}: holds weights quantised by {method}, and read are {known}; name the unquantised model"
        )
    try:
        return _FORMATS[method](settings)
    except ValueError as error:
        raise UserError(f"{origin}: holds weights quantised by {method} with {error}") from None


def layers(stored: Stored, origin: str) -> Iterator[tuple[str, Tensor | Grid]]:
    """Each tensor of the checkpoint under its name, and each quantised weight as ``LAYER.weight``.

    Raises :class:`UserError`, beginning with ``origin``, where a layer lacks a part, or its parts do not fit.
    """
    from safetensors import SafetensorError, safe_open

    form = stored.format
    with ExitStack() as opened:
        try:
            files = [opened.enter_context(safe_open(file, framework="pt")) for file in stored.files]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{origin}: its weights cannot be read ({whole_message(error)})") from None
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        small = [name.rpartition(".")[0] for name, file in where.items() if _is_small(name, file, form)]
        parts = {f"{layer}.{part}" for layer in small for part in (form.values, *form.needed, *form.optional)}
        for layer in small:
            found = {
                part: where[f"{layer}.{part}"].get_tensor(f"{layer}.{part}")
                for part in (form.values, *form.needed, *form.optional)
                if f"{layer}.{part}" in where
            }
            missing = [part for part in form.needed if part not in found]
            try:
                if missing:
                    raise ValueError(f"its {missing[0]} is missing")
                yield f"{layer}.weight", form.read(found)
            except (ValueError, RuntimeError, IndexError) as error:
                raise UserError(f"{origin}: {layer}, stored as {form.name}: {whole_message(error)}") from None
        for name in where.keys() - parts:
            if not name.endswith(tuple(f".{unused}" for unused in form.unused)):
                yield name, where[name].get_tensor(name)


def _is_small(name: str, file: Any, form: Format) -> bool:
    named = name.rpartition(".")[2] == form.values
    return named and (form.values != "weight" or file.get_slice(name).get_dtype() in _SMALL)


@dataclass(frozen=True)
class Read:
    """A checkpoint that came quantised, read."""

    format: Format
    tensors: dict[str, Tensor]
    """All of it by name, quantised weights as those that they stand for."""
    kept: dict[str, QuantisedWeight]
    """Layer -> its weight as it came, where an engine can hold that."""
    quantised: list[str]
    """Every layer whose weight came quantised."""

    def said(self, held: int, number_type: str) -> str:
        """What the reader of the report must know, where ``held`` of the layers stay as they came."""
        total = len(self.quantised)
        parts = [f"{held} layers as they came, scales rounded to {number_type}"] if held else []
        parts += [f"{total - held} dequantised to {number_type}"] if held < total else []
        rows = "; rows, which it means to be rounded too, are not" if self.format.rounds_rows and held < total else ""
        return f"weights come as {self.format.name}: {', '.join(parts)}{rows}"


def read(stored: Stored, dtype: torch.dtype, origin: str, keep: Kind | None = None) -> Read:
    """The checkpoint with weights of ``dtype``, and those as they came that can be held as ``keep``; raises as
    :func:`layers`."""
    found = Read(stored.format, {}, {}, [])
    for name, each in layers(stored, origin):
        if isinstance(each, Tensor):
            found.tensors[name] = each
            continue
        found.tensors[name] = each.dequantised(dtype)
        found.quantised.append(name.removesuffix(".weight"))
        if keep is not None and (weight := held(each, keep, dtype)) is not None:
            found.kept[name.removesuffix(".weight")] = weight
    return found
