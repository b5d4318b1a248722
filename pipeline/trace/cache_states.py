"""What layers of linear attention, state spaces and short convolutions keep of a text, whatever its length.

A convolution reads the latest columns alone, which are each row's own wherever it ends.  What a recurrence has summed
up has every token of its row in it, so padding must never run through it: there is one row, cut to its own tokens.
States go into a program and come out as new tensors; transformers writes into its own, so a program is handed copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from passes.errors import RunError

KINDS = ("conv", "recurrent")
"""The latest columns that a convolution reads, and what a recurrence has summed up."""
Key = tuple[str, int]
"""Kind and number of a state within its layer."""


@dataclass(frozen=True)
class State:
    """A tensor of ``sizes`` that the model's layer number ``layer`` keeps."""

    layer: int
    kind: str
    number: int
    sizes: tuple[int, ...]
    dtype: str

    @property
    def recurs(self) -> bool:
        return self.kind == "recurrent"

    @staticmethod
    def of(described: dict[str, Any]) -> State:
        """From an engine's manifest."""
        return State(**{**described, "sizes": tuple(described["sizes"])})


class States(LinearAttentionLayer):
    """A layer that begins with ``states``, or where there are none at the begin of a text; it keeps new tensors and
    writes into none.  ``ends`` [batch]: the place of each row's last token, where rows are of different lengths."""

    def __init__(self, states: Mapping[Key, Tensor], count: int, ends: Tensor | None) -> None:
        super().__init__(number_of_states=count)
        self.ends = ends
        for (kind, number), state in states.items():
            self.all_of(kind)[number] = state
        for number in {number for _, number in states}:
            self.has_previous_state[number] = True

    def all_of(self, kind: str) -> dict[int, Tensor | None]:
        """The states of a ``kind`` by their numbers."""
        found: dict[int, Tensor | None] = getattr(self, f"{kind}_states")
        return found

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """The columns [batch, channels, length] that the convolution reads, those that were kept before them; the last
        ``conv_kernel_size`` are kept."""
        before, width = self.conv_states[state_idx], conv_kernel_size or conv_states.shape[-1]
        if self.ends is not None and conv_kernel_size is None:
            raise RunError("ragged_batch", "a convolution whose columns the model cuts itself, at one end for all rows")
        every = conv_states if before is None else torch.cat([before, conv_states], -1)
        # A prompt may be shorter than the kernel: zeros stand before it, whatever its length.
        kept = pad(every, (width, 0)) if conv_kernel_size else every
        if self.ends is None:
            self.conv_states[state_idx] = kept[..., -width:]
        else:
            columns = self.ends.unsqueeze(1) + torch.arange(1, width + 1, device=kept.device)
            self.conv_states[state_idx] = kept.gather(2, columns.unsqueeze(1).expand(-1, kept.shape[1], -1))
        self.has_previous_state[state_idx] = True
        return every

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


def states_of(number: int, layer: object, batch: int) -> list[State]:
    """Of ``batch`` rows, from transformers' own ``layer``, the model's ``number``-th, that has seen tokens of one."""
    if not isinstance(layer, LinearAttentionLayer):
        return []
    found = [(kind, i, getattr(layer, f"{kind}_states")[i]) for kind in KINDS for i in range(layer.number_of_states)]
    return [
        State(number, kind, i, (batch, *state.shape[1:]), str(state.dtype).removeprefix("torch."))
        for kind, i, state in found
        if state is not None
    ]


def by_layer(
    states: Sequence[State], tensors: Sequence[Tensor] | None, ends: Tensor | None = None
) -> dict[int, States]:
    """The layers that keep ``states``, by their numbers: with copies of ``tensors``, which are in the same order, or at
    the begin of a text; ``ends``: see :class:`States`."""
    given = [None] * len(states) if tensors is None else tensors
    pairs = sorted(zip(states, given, strict=True), key=lambda pair: pair[0].layer)
    found = {}
    for number, group in groupby(pairs, key=lambda pair: pair[0].layer):
        own = list(group)
        held = {(state.kind, state.number): tensor.clone() for state, tensor in own if tensor is not None}
        found[number] = States(held, 1 + max(state.number for state, _ in own), ends)
    return found


def made(states: Sequence[State], cache: Cache) -> list[Tensor]:
    """What the layers of ``cache`` hold of ``states``, in the types in which they are kept."""
    found = []
    for state in states:
        tensor = cache.layers[state.layer].all_of(state.kind)[state.number]
        found.append(tensor.to(getattr(torch, state.dtype)))
    return found
