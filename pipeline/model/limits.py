"""Whether the model that was loaded takes what it is to run: only its own config tells."""

from __future__ import annotations

from passes.errors import UserError
from pipeline.config.schema import GenerateShape, ShapeConfig
from pipeline.model.load import LoadedModel
from pipeline.model.text import token_batch


def check_fit(loaded: LoadedModel, shape: ShapeConfig, generate: GenerateShape | None, seed: int) -> None:
    """Raises :class:`UserError` where ``shape`` or ``generate`` goes beyond the model's positions, and for a tokenizer
    of another model."""
    described = loaded.model.config.get_text_config()
    limit = getattr(described, "max_position_embeddings", None)
    if limit is not None and shape.max > limit:
        raise UserError(f"shape.max={shape.max}: above max_position_embeddings={limit} of {loaded.source}")
    total = 0 if generate is None else generate.input_length + generate.output_length
    if generate is not None and limit is not None and total > limit:
        raise UserError(
            f"benchmark.generate.output_length={generate.output_length}: with the prompt {total} tokens, above "
            f"max_position_embeddings={limit} of {loaded.source}"
        )
    token_batch(loaded.tokenizer, described.vocab_size, 1, 1, seed)
