"""The least time that a prefill, a decode step and a generation can take on a card: bytes that must be read,
operations that must be done.

Roofline model: Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes.quantised import QuantisedWeight


@dataclass(frozen=True)
class DecoderCost:
    """The numbers of a dense decoder that its cost hangs on."""

    heads: int
    """Query heads; grouped keys and values save memory, not operations."""
    head_size: int
    windows: tuple[int | None, ...]
    """One entry a layer: keys that a query sees at most, itself included; None is all before it."""
    layer_parameters: int
    """Parameters in the layers' matrix products."""
    lm_head_parameters: int
    """Vocabulary size times hidden size, tied to the embedding or not."""
    all_logits: bool
    """Logits of every position, or of the last alone."""
    bytes_per_parameter: int
    """Of keys and values too."""
    key_value_heads: int
    prompt_weights: int | None = None
    """Bytes of the weights of all products, as the engine of a prompt holds them; None: all of one type."""
    step_weights: int | None = None
    """The same of the engine of the tokens after it."""


def decoder_cost(model: PreTrainedModel, logits: str) -> DecoderCost | None:
    """The cost numbers of a model at the precision it has; ``logits`` is ``last`` or ``all``.

    None where weights have more than two dimensions: of a mixture of experts, or of a convolution, the
    number of parameters does not tell the operations.
    """
    from torch import nn

    head = model.get_output_embeddings()
    layer_parameters = 0
    for module in model.modules():
        if module is head or isinstance(module, nn.Embedding):
            continue  # an embedding is looked up, not multiplied
        for weight in module.parameters(recurse=False):
            if weight.dim() > 2:
                return None
            if weight.dim() == 2:
                layer_parameters += weight.numel()
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderCost(
        heads=config.num_attention_heads,
        head_size=head_size,
        windows=_windows(config),
        layer_parameters=layer_parameters,
        lm_head_parameters=0 if head is None else head.weight.numel(),
        all_logits=logits == "all",
        bytes_per_parameter=next(model.parameters()).element_size(),
        key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )


def with_few_bits(
    cost: DecoderCost | None, model: PreTrainedModel, quantised: Mapping[str, QuantisedWeight], prompt: bool, step: bool
) -> DecoderCost | None:
    """``cost`` of engines that hold the ``quantised`` weights of ``model`` as such: that of a ``prompt``, and of a
    ``step`` after it."""
    if cost is None or not quantised:
        return cost
    from torch import nn

    whole = (cost.layer_parameters + cost.lm_head_parameters) * cost.bytes_per_parameter
    products = [each for name, each in quantised.items() if not isinstance(model.get_submodule(name), nn.Embedding)]
    saved = sum(each.values.numel() * cost.bytes_per_parameter - each.bytes for each in products)
    scales = sum(each.scales.numel() * cost.bytes_per_parameter for each in products)
    small = whole - saved + scales
    return replace(cost, prompt_weights=small if prompt else None, step_weights=small if step else None)


def _windows(config: Any) -> tuple[int | None, ...]:
    """Attention window of each layer, as transformers' configs give it."""
    window = getattr(config, "sliding_window", None)  # not every architecture has the notion
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def prefill_flops(cost: DecoderCost, batch: int, length: int) -> int:
    """Floating-point operations of one prefill of [batch, length] tokens.

    Matrix products: 2 for each parameter and token (lm_head only where logits are wanted).  Attention:
    4 x head_size for each head and each (query, key) pair under the causal mask: 2 for Q K^T, 2 for the
    product with V.  Norms, activations and softmax are left out, so this is a lower bound.
    """
    tokens = batch * length
    logit_rows = tokens if cost.all_logits else batch
    products = 2 * (cost.layer_parameters * tokens + cost.lm_head_parameters * logit_rows)
    pairs = sum(_pairs(length, window) for window in cost.windows)
    return products + 4 * cost.head_size * cost.heads * batch * pairs


def _pairs(length: int, window: int | None) -> int:
    """Pairs with 0 <= query - key < window."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def prefill_bytes(cost: DecoderCost) -> int:
    """Bytes of one prefill that no cache can save: every weight of a product, read once."""
    whole = (cost.layer_parameters + cost.lm_head_parameters) * cost.bytes_per_parameter
    return whole if cost.prompt_weights is None else cost.prompt_weights


def prefill_floor_s(cost: DecoderCost, batch: int, length: int, copy_gb_per_s: float, matmul_tflops: float) -> float:
    """Seconds below which this card cannot do it: the longer of reading (1e9 byte/s) and computing (1e12/s)."""
    reading = prefill_bytes(cost) / (copy_gb_per_s * 1e9)
    computing = prefill_flops(cost, batch, length) / (matmul_tflops * 1e12)
    return max(reading, computing)


def decode_floor_s(
    cost: DecoderCost, batch: int, cache_length: int, copy_gb_per_s: float, matmul_tflops: float
) -> float:
    """Seconds below which this card cannot take one decode step that sees ``cache_length`` tokens, its own included:
    every weight of a product and the keys and values in sight read once, and the operations on them."""
    seen = sum(cache_length if window is None else min(window, cache_length) for window in cost.windows)
    weights = cost.layer_parameters + cost.lm_head_parameters
    cache = 2 * cost.key_value_heads * cost.head_size * seen * batch
    held = weights * cost.bytes_per_parameter if cost.step_weights is None else cost.step_weights
    reading = (held + cache * cost.bytes_per_parameter) / (copy_gb_per_s * 1e9)
    operations = batch * (2 * weights + 4 * cost.head_size * cost.heads * seen)
    return max(reading, operations / (matmul_tflops * 1e12))


def step_floors_s(
    cost: DecoderCost,
    batch: int,
    input_length: int,
    output_length: int,
    cached: bool,
    copy_gb_per_s: float,
    matmul_tflops: float,
) -> list[float]:
    """The least seconds of each of the ``output_length`` passes of a generation: the prefill of the prompt, then the
    decode steps; without a cache each of those is the prefill of everything before it."""
    cost = replace(cost, all_logits=False)  # only the last position chooses a token
    rates = (copy_gb_per_s, matmul_tflops)
    step = decode_floor_s if cached else prefill_floor_s
    lengths = range(input_length + 1, input_length + output_length)
    return [prefill_floor_s(cost, batch, input_length, *rates), *(step(cost, batch, n, *rates) for n in lengths)]
