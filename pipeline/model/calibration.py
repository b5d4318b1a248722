"""Rows of a text, looked at before weights are rounded: where their size decides how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from passes.errors import RunError
from pipeline.model.positions import positions_of
from pipeline.model.real_text import LETTERS, real_text
from pipeline.model.text import tokens_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.config.quantize import CalibrationConfig
    from pipeline.model.load import LoadedModel

SETTING = "quantize.calibration.text"
SAMPLES, SAMPLES_OF_GPTQ = 16, 32
"""Where no number is asked for.  With 16 GPTQ lost half as much again on SmolLM2-135M."""


def samples(loaded: LoadedModel, asked: CalibrationConfig, seed: int, usual: int = SAMPLES) -> Tensor:
    """Pieces of the text that is asked for, which do not overlap: int64 [samples, length] on the model's device, each
    behind the token that its tokenizer puts in front of a text.  ``seed``, ``usual``: which and how many, where nothing
    is asked for.

    Without a file the text is what stands behind that on which :mod:`pipeline.verify.quality` judges; without a
    tokenizer tokens are random.  Raises :class:`UserError` where the text has not as many, and as
    :func:`pipeline.model.real_text.real_text`.
    """
    seed = seed if asked.seed is None else asked.seed
    count = usual if asked.samples is None else asked.samples
    limit = positions_of(loaded.model.config) or asked.length
    length = min(asked.length, limit)
    if loaded.tokenizer is None:
        return tokens_for(loaded, count, length, seed)
    text = real_text(asked.text, loaded, count * length, SETTING, behind=LETTERS)
    lead = torch.tensor([] if text.begin is None else [text.begin], dtype=torch.int64)
    pieces = text.tokens.unfold(0, length - len(lead), length - len(lead))
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.cat([lead.expand(count, -1), pieces[chosen]], dim=1).to(loaded.model.device)


def see_rows(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    texts: Iterable[Tensor],
    see: Callable[[str, Tensor], None],
) -> None:
    """Has ``model`` read ``texts``, int64 [batch, length] each, and ``see`` the rows [..., in] of each of ``layers``
    by name, before the layer multiplies them.  Raises :class:`RunError` where one is not finite."""

    def look(name: str, rows: Tensor) -> None:
        if not bool(rows.isfinite().all()):
            raise RunError("precision", f"the rows of {name} are not finite on the text of quantize.calibration")
        see(name, rows)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, given: look(name, given[0])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    if (head := model.get_output_embeddings()) is not None:  # nobody asks for the logits of a whole text
        hooks.append(head.register_forward_pre_hook(lambda layer, given: (given[0][:, -1:], *given[1:])))
    try:
        with torch.no_grad():
            for tokens in texts:
                model(input_ids=tokens, use_cache=False)
    finally:
        for each in hooks:
            each.remove()


def largest_rows(loaded: LoadedModel, layers: Mapping[str, nn.Module], tokens: Tensor) -> dict[str, float]:
    """The largest magnitude in the rows of each layer over ``tokens`` [samples, length], of the model as it was
    loaded.  Raises :class:`RunError` where one is not finite."""
    found = dict.fromkeys(layers, torch.finfo(torch.float16).tiny)

    def see(name: str, rows: Tensor) -> None:
        found[name] = max(found[name], float(rows.abs().max()))

    see_rows(loaded.model, layers, tokens.split(1), see)
    return found
