"""What text says of the rows of a model's layers, where their size decides how weights are rounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from passes.errors import RunError
from pipeline.model.real_text import real_text
from pipeline.model.text import token_batch

if TYPE_CHECKING:
    from pipeline.config.quantize import CalibrationConfig
    from pipeline.model.load import LoadedModel


def texts(loaded: LoadedModel, asked: CalibrationConfig, seed: int) -> Tensor:
    """Tokens int64 [``asked.samples``, length] on the device of ``loaded``: pieces of a text that do not overlap, and
    are no part of that on which quality is judged where none is named; random ones where there is no tokenizer.  Raises
    :class:`UserError` for a text that cannot be read, or is too short."""
    seed = seed if asked.seed is None else asked.seed
    config, samples = loaded.model.config.get_text_config(), asked.samples
    length = min(asked.length, getattr(config, "max_position_embeddings", None) or asked.length)
    if loaded.tokenizer is None:
        return token_batch(None, config.vocab_size, samples, length, seed).to(loaded.model.device)
    text = real_text(asked.text, loaded, samples * length, "quantize.calibration.text", behind=True)
    pieces = len(text.tokens) // length
    chosen = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[:samples]
    rows = text.tokens[: pieces * length].reshape(pieces, length)[chosen]
    if text.begin is not None:
        rows = torch.cat([torch.full_like(rows[:, :1], text.begin), rows[:, :-1]], 1)
    return rows.to(loaded.model.device)


def largest_rows(loaded: LoadedModel, layers: dict[str, nn.Linear], tokens: Tensor) -> dict[str, float]:
    """The largest magnitude in the rows of each layer, over ``tokens`` [samples, length], of the model as it is."""
    found = dict.fromkeys(layers, torch.finfo(torch.float16).tiny)

    def look(name: str, given: tuple[Tensor, ...]) -> None:
        found[name] = max(found[name], float(given[0].abs().max()))

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, given: look(name, given)

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for row in tokens.split(1):
                loaded.model(input_ids=row, use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    if not all(map(math.isfinite, found.values())):
        raise not_finite(next(name for name, each in found.items() if not math.isfinite(each)))
    return found


def not_finite(name: str) -> RunError:
    """What is raised where the rows of layer ``name`` are."""
    return RunError("precision", f"the rows of {name} are not finite on the text of quantize.calibration")
