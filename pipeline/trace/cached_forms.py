"""The two programs that generate with a KV cache of fixed capacity, as call forms that can be traced.

*prefill* runs the prompts and fills the cache, *decode* runs one token a row.  Rows may be of different lengths: they
begin at place 0 of the cache, so a prompt is padded on the right (:mod:`pipeline.generate.with_cache` moves padding
there), where a causal mask hides it.  The model's own code makes the masks, from the cache it is handed, each row's for
its own place in it (:func:`masks_of_rows`): the strategies prove them like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from passes.errors import AS_IT_IS, RunError
from passes.graph.cache_ops import cache_update
from passes.proof.calls import written_out
from pipeline.config.schema import ShapeConfig
from pipeline.trace.cache_layers import HandedIn, caches, in_order, latest, of_known_sizes, read, results, stored, taken
from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.call_form import ONE_LENGTH, InputSpec, NumberFromData, Traced, example_length, exported, own_rows
from pipeline.trace.step_checks import is_the_model, reads_first_row

WITHOUT = f"try cache=none; {AS_IT_IS}"


class _Layer(HandedIn):
    """Where the layer is written, and it is written, and what attention is given to read.

    ``position`` [batch]: where a decode step writes (``whole``), or the place of a prompt's last token; ``ring``: the
    places of a layer that keeps the latest tokens alone.
    """

    def __init__(
        self,
        keys: Tensor | None,
        values: Tensor | None,
        position: Tensor,
        whole: bool,
        ring: int | None,
        full: bool = False,
    ) -> None:
        super().__init__(keys, values)
        self.position, self.whole, self.ring, self.full = position, whole, ring, full
        self.is_sliding = ring is not None  # transformers asks the first such layer how many keys its mask is of

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        channels = stored(value_states)
        if self.whole:
            assert self.keys is not None and self.values is not None
            ring = self.ring is not None
            self.keys = cache_update(self.keys, key_states, self.position, ring)
            self.values = cache_update(self.values, channels, self.position, ring)
            return self.keys, read(self.values, value_states)
        kept = [key_states, channels]
        if self.ring is not None:
            tokens = latest(self.position, self.ring).clamp(min=0)
            kept = [taken(x, tokens) for x in kept]
        if self.keys is not None and self.values is not None:
            start = torch.zeros_like(self.position)
            kept = [cache_update(self.keys, kept[0], start), cache_update(self.values, kept[1], start)]
        self.keys, self.values = kept
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert not self.whole or self.keys is not None
        return (self.keys.shape[2] if self.whole else query_length), 0  # type: ignore[union-attr]

    def get_seq_length(self) -> Any:
        if self.full:
            return self.get_max_length() - 1  # before the token that is being run
        return self.position[0] if self.whole else 0  # one for all rows, see trace_decode

    def get_max_length(self) -> int:
        return self.keys.shape[2] if self.whole else -1  # type: ignore[union-attr]


def _mask_of_rows(
    position: Tensor,
    *,
    rings: Collection[int] = (),
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    device: torch.device,
    kv_offset: int = 0,
    use_vmap: bool = False,
    **more: Any,
) -> Tensor | None:
    """[batch, 1, q_length, kv_length] bool, as transformers' ``sdpa_mask``, but with the queries of row b at the places
    ``position[b]`` and up; a ring of ``kv_length`` places, if that is one of ``rings``, holds the tokens up to there.

    A function that is not made of whole tensors (``use_vmap``) is left to ``sdpa_mask``, with its one place for all.
    """
    if use_vmap:
        if kv_length in rings:
            raise RunError("export", f"a mask over a ring of {kv_length} places that is not made of whole tensors")
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset}
        return sdpa_mask(**sizes, mask_function=mask_function, device=device, use_vmap=True, **more)
    rows, heads = torch.arange(batch_size, device=device), torch.arange(1, device=device)
    queries = torch.arange(q_length, device=device) + position.unsqueeze(1)
    if kv_length in rings:
        keys = latest(position, kv_length)
    else:
        keys = (torch.arange(kv_length, device=device) + kv_offset).unsqueeze(0)
    keys = keys[:, None, None, :]
    mask = mask_function(rows[:, None, None, None], heads[None, :, None, None], queries[:, None, :, None], keys)
    if kv_length in rings:
        mask = mask & (keys >= 0)  # where no token was
    return mask.expand(batch_size, -1, q_length, kv_length)


def _added_mask_of_rows(position: Tensor, *, dtype: torch.dtype = torch.float32, **given: Any) -> Tensor:
    """The same as transformers' ``eager_mask`` has it: 0, or the least number of ``dtype``, added to the scores."""
    mask = _mask_of_rows(position, **given)
    assert mask is not None
    zero, least = (torch.full((), each, dtype=dtype, device=mask.device) for each in (0.0, torch.finfo(dtype).min))
    return torch.where(mask, zero, least)


@contextmanager
def masks_of_rows(position: Tensor, rings: Collection[int] = ()) -> Iterator[None]:
    """While the block runs, a model that lets transformers make its masks gets each row's for its own place,
    ``position`` [batch]: a cache tells transformers one length, for all rows; and masks over as many keys as one of
    ``rings`` has places for the tokens that it holds."""
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    masks["sdpa"] = partial(_mask_of_rows, position, rings=rings)
    masks["eager"] = partial(_added_mask_of_rows, position, rings=rings)
    try:
        yield
    finally:
        del masks["sdpa"], masks["eager"]  # the local entries; the library's own stand behind them


class PrefillForm(nn.Module):
    """Prompts in, the logits behind each prompt's last token and the filled cache out."""

    def __init__(self, model: PreTrainedModel, cache: CacheShape) -> None:
        super().__init__()
        self.model = model
        self.cache = cache

    def forward(
        self,
        input_ids: Tensor,
        last: Tensor | None = None,
        keys: list[Tensor] | None = None,
        values: list[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """``input_ids`` [batch, length]; ``last`` [batch], the place of each row's last real token, where there is
        more than one row; caches as in :class:`CacheShape` that are updated in place, or none.

        Returns logits [batch, 1, vocabulary], then every layer's keys and every layer's values, the caches or where
        none were handed in those of the prompts, of capacity ``length`` but for rings; and every state.
        """
        none = [None] * len(self.cache.layers)
        layers = zip(keys or none, values or none, self.cache.rings, strict=True)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        ends = positions[:, -1] if last is None else last
        attending = [_Layer(k, v, ends, whole=False, ring=ring) for k, v, ring in layers]
        cache = in_order(self.cache, attending, ends=last)
        output = self.model(
            input_ids=input_ids,
            position_ids=positions,
            cache=cache,
            use_cache=True,
            logits_to_keep=1 if last is None else last,
        )
        logits = output.logits
        return results(logits if last is None else own_rows(logits), self.cache, cache)


class DecodeForm(nn.Module):
    """One token a row in, the logits behind it and the updated cache out."""

    def __init__(self, model: PreTrainedModel, cache: CacheShape) -> None:
        super().__init__()
        self.model = model
        self.cache = cache
        self.says_full = False
        """Have the cache say that it is full, for a model that makes a mask or a bias as long as its cache says that it
        is, which is a number out of a tensor (Falcon's and MPT's alibi, OPT).  What a row sees, and where its token is,
        are said by :func:`masks_of_rows` and ``position_ids``."""

    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        keys: list[Tensor] | None = None,
        values: list[Tensor] | None = None,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """``input_ids`` [batch, 1]; ``position`` [batch], where each row writes; the caches, and every state.

        Returns logits [batch, 1, vocabulary], the caches and the states.
        """
        rings = self.cache.rings
        layers = zip(keys or [], values or [], rings, strict=True)
        attending = [_Layer(k, v, position, whole=True, ring=ring, full=self.says_full) for k, v, ring in layers]
        cache = in_order(self.cache, attending, states or [])
        with masks_of_rows(position, frozenset(ring for ring in rings if ring is not None)):
            output = self.model(
                input_ids=input_ids,
                position_ids=position.unsqueeze(1),
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return results(output.logits, self.cache, cache)


def trace_prefill(form: PrefillForm, cache: CacheShape, shape: ShapeConfig, device: torch.device) -> Traced:
    """The prefill program of ``form``; its caches are inputs where ``cache`` is updated in the engine."""
    specs = [InputSpec.lengths("input_ids", shape)]
    tokens = torch.zeros(cache.batch, example_length(shape), dtype=torch.int64, device=device)
    inputs: dict[str, Any] = {"input_ids": tokens}
    dynamic: dict[str, Any] | None = None
    if cache.batch > 1:
        specs.append(InputSpec.places(cache.batch))
        inputs["last"] = torch.zeros(cache.batch, dtype=torch.int64, device=device)
    if cache.mode == "in_engine":
        given = caches(cache, device)
        given.pop("states", None)  # a text begins without any
        specs += cache.specs()[: 2 * len(cache.layers)]
        inputs |= given
    if shape.kind == "dynamic":
        dynamic = of_known_sizes(inputs) | {"input_ids": {1: Dim("length", min=shape.min, max=shape.max)}}
    return Traced(exported(form, inputs, dynamic, WITHOUT, ONE_LENGTH), tuple(specs))


def trace_decode(form: DecodeForm, cache: CacheShape, device: torch.device) -> Traced:
    """The decode program of ``form``; raises :class:`RunError` of kind ``ragged_batch`` for a batch of a model that
    computes something from the one length that it asks its cache for, such as a mask of its own making."""
    specs = (
        InputSpec("input_ids", cache.batch, 1, 1, 1),
        InputSpec("position", cache.batch, 1, 1, 1, sizes=(cache.batch,)),
        *cache.specs(),
    )
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(cache.batch, 1, dtype=torch.int64, device=device),
        "position": torch.full((cache.batch,), 3, dtype=torch.int64, device=device),
    }
    inputs |= caches(cache, device)
    try:
        program = exported(form, inputs, None, WITHOUT)
    except NumberFromData:
        form.says_full = True
        program = exported(form, inputs, None, WITHOUT)
    if (form.says_full or written_out(program.graph_module)) and not is_the_model(program, form.model, cache, device):
        raise RunError(
            "export",
            f"{type(form.model).__name__} makes masks of its own for a cache that grows, and this one has a fixed "
            f"capacity; {WITHOUT}",
        )
    if cache.batch > 1 and reads_first_row(program):
        raise RunError(
            "ragged_batch",
            f"shape.batch={cache.batch}: {type(form.model).__name__} computes with one length of the cache for all "
            "rows, and rows of a batch differ; set shape.batch=1",
        )
    return Traced(program, specs)
