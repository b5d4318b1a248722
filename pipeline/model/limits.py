"""Whether the model that was loaded takes what it is to run: only its own config tells."""

from __future__ import annotations

import torch

from passes.errors import UserError
from passes.precision import PRECISIONS
from pipeline.config.schema import BackendConfig, GenerateShape, ShapeConfig
from pipeline.model.load import LoadedModel
from pipeline.model.positions import positions_of
from pipeline.model.rotary import check_crossing, turn_of
from pipeline.model.text import token_batch, tokens_for
from pipeline.private.of_transformers import has_flex_attention

TRIED = 8
"""Tokens of the trial whether a model fits fp16: Gemma 3 overflows at the second, and a CPU takes 0.4 s for them."""


def check_fit(
    loaded: LoadedModel, shape: ShapeConfig, generate: GenerateShape | None, seed: int, one_length: bool = False
) -> None:
    """Raises :class:`UserError` where ``shape`` or ``generate`` goes beyond the model's positions, or across the length
    at which it turns them otherwise, and for a tokenizer of another model.  ``one_length``: shorter sequences are to
    run at ``shape.max`` too."""
    described = loaded.model.config.get_text_config()
    limit = positions_of(described)
    if limit is not None and shape.max > limit:
        raise UserError(f"shape.max={shape.max}: above max_position_embeddings={limit} of {loaded.source}")
    total = 0 if generate is None else generate.input_length + generate.output_length
    if generate is not None and limit is not None and total > limit:
        raise UserError(
            f"benchmark.generate.output_length={generate.output_length}: with the prompt {total} tokens, above "
            f"max_position_embeddings={limit} of {loaded.source}"
        )
    turn = turn_of(loaded.model.config)
    if generate is not None:
        check_crossing(turn, generate.input_length, total, f"benchmark.generate.output_length={generate.output_length}")
    if one_length and turn is not None and turn < shape.max:
        raise UserError(
            f"shape.kind=static: sequences of up to {turn} tokens would have the rotary factors that {loaded.source} "
            "has for longer ones; set shape=dynamic"
        )
    token_batch(loaded.tokenizer, described.vocab_size, 1, 1, seed)


def check_attention(loaded: LoadedModel, backend: BackendConfig) -> None:
    """Raises :class:`UserError` where the model cannot compute attention by the function that ``backend`` names."""
    model = type(loaded.model)
    if backend.attention == "flex_attention" and not has_flex_attention(model):
        raise UserError(f"backend.attention={backend.attention}: {model.__name__} has none; set backend.attention=null")


def check_range(loaded: LoadedModel, precision: str, seed: int) -> None:
    """Raises :class:`UserError` where pretrained weights are numbers and what they compute is none in fp16: its largest
    is 65504, and models that were trained in bf16 may go beyond.  A longer text may still; verification sees to that.
    """
    if loaded.weights != "pretrained" or loaded.model.dtype != torch.float16:
        return
    with torch.no_grad():
        logits = loaded.model(tokens_for(loaded, 1, TRIED, seed), logits_to_keep=1).logits
    if not logits.isfinite().all() and all(weight.isfinite().all() for weight in loaded.model.parameters()):
        key, value = ("precision", precision) if precision in PRECISIONS else ("quantize.base", "fp16")
        raise UserError(
            f"{key}={value}: what {loaded.source} computes goes beyond its range, and its logits are no numbers; "
            f"set {key}=bf16"
        )
