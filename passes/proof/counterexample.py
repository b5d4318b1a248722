"""Inputs on which a mask is not causal, found by the solver and confirmed by running the mask's graph.

The search decides nothing: a mask is causal because it was proved, and what is found here is a witness that it is
not, each one confirmed in PyTorch.  The solver says how small a witness can be.  At these sizes readable inputs are
tried before the solver's own; where an operation without a model led it astray, larger sizes follow.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from passes.proof.calls import AttentionCall
from passes.proof.mask_program import MaskProgram, NotRunnable
from passes.proof.smallest_model import Model, possible_sizes, smallest_model
from passes.proof.symbolic import Evaluator
from passes.proof.terms import Term

SOLVER_SECONDS = 1.0
TRIAL_SECONDS = 1.0
MOST_ELEMENTS = 2**26
"""Largest tensor that is made to confirm a counterexample: length 8192 in full."""
MOST_TRIAL_ELEMENTS = 2**22
"""The same for a trial: length 2048."""
MOST_VARIANTS = 300
FEW_SIZES = 6
"""Sizes at which a negative value, which no tokenizer makes, is not yet tried."""
MOST_STORED = 4096
MOST_SHOWN = 64


@dataclass(frozen=True)
class Counterexample:
    """One element of a mask that differs from the causal mask, on concrete inputs."""

    batch: int
    head: int
    query: int
    key: int
    attends: bool
    """Whether the mask lets the query see the key; the causal mask (key <= query) says the opposite, or there is a
    ``bias``."""
    bias: float | None
    """What a float mask adds to a score that stays visible, where that is not 0."""
    queries: int
    keys: int
    sizes: dict[str, int]
    """The shape symbols' values."""
    inputs: dict[str, Any]
    """The run-time inputs that the mask reads, as nested lists; empty beyond 4096 elements."""

    @property
    def text(self) -> str:
        """What dropping the mask (and asking for ``is_causal``) would change, as one clause."""
        head = f" in head {self.head}" if self.head else ""
        query = f"query {self.query}" + (f" of sequence {self.batch}" if self.batch else "") + head
        if not self.attends:
            change = f"key {self.key} would be visible to {query}"
        elif self.key > self.query:
            change = f"key {self.key} would be hidden from {query}"
        else:
            change = f"the bias {self.bias:.4g} of key {self.key} at {query} would be lost"
        length = f"length {self.keys}" if self.queries == self.keys else f"{self.queries} queries and {self.keys} keys"
        contents = ", ".join(f"{name} = {_shown(value)}" for name, value in self.inputs.items())
        when = f" when {contents}" if contents else ""
        # The inputs show the length themselves, unless none of them has one.
        at = "" if any(_last_size(value) == self.keys for value in self.inputs.values()) else f" at {length}"
        return f"dropped, {change}{at}{when}"

    def describe(self) -> dict[str, Any]:
        """The report's form."""
        return asdict(self) | {"text": self.text}


def find(
    call: AttentionCall,
    evaluator: Evaluator,
    attends: Term,
    position: Sequence[Term],
    inside: Sequence[Term],
    inputs: frozenset[str],
) -> Counterexample | None:
    """A small counterexample to "the mask of ``call`` is causal", or None where none was found.

    ``attends``: the mask's truth at ``position`` = (batch, head, query, key), a term of ``evaluator``; ``inside``: the
    premises 0 <= index < size; ``inputs``: names of the run-time inputs.  It takes at most about
    ``SOLVER_SECONDS + TRIAL_SECONDS``, and mostly some ten milliseconds.
    """
    try:
        program = MaskProgram(call, evaluator.constants, inputs)
    except NotRunnable:
        return None
    claim = attends != (position[3] <= position[2])
    model = smallest_model(program, evaluator, claim, position, inside, MOST_ELEMENTS, SOLVER_SECONDS)
    if model is False:
        return None
    deadline = time.perf_counter() + TRIAL_SECONDS
    least = 0
    if isinstance(model, Model):
        found = _readable(program, model.sizes, MOST_ELEMENTS, deadline)
        found = found or _confirmed(program, model.sizes, model.inputs, MOST_ELEMENTS)
        if found:
            return found
        least = sum(model.sizes.values())
    for some, negative in ((FEW_SIZES, False), (None, True)):
        sizes_to_try = itertools.islice(_sizes(program, evaluator, least), some)
        for sizes in possible_sizes(evaluator, sizes_to_try):
            found = _readable(program, sizes, MOST_TRIAL_ELEMENTS, deadline, negative)
            if found or time.perf_counter() > deadline:
                return found
    return None


def _confirmed(
    program: MaskProgram, sizes: dict[str, int], inputs: dict[str, Tensor], most_elements: int
) -> Counterexample | None:
    """The first element, by query and key, at which the mask that the graph makes is not the causal one."""
    scores = program.scores(sizes)
    if 0 in scores or program.elements(sizes) > most_elements:
        return None
    try:
        mask = program.run(sizes, inputs)
    except (RuntimeError, IndexError, ValueError):  # the model itself refuses such inputs
        return None
    queries, keys = scores[2:]
    causal = torch.arange(keys) <= torch.arange(queries)[:, None]
    if mask.dtype == torch.bool:
        wrong = mask ^ causal
    elif mask.is_floating_point():
        wrong = torch.where(causal, mask != 0, mask > torch.finfo(mask.dtype).min)
    else:
        return None
    wrong = wrong.reshape((1,) * (4 - wrong.dim()) + wrong.shape)
    query = _first(wrong.any(-1).any(0).any(0))
    if query is None:
        return None
    key = _first(wrong[:, :, query].any(0).any(0))
    assert key is not None
    batch, head = (int(place[0]) for place in wrong[:, :, query, key].nonzero(as_tuple=True))
    value = mask.expand(wrong.shape)[batch, head, query, key].item()
    is_bool = mask.dtype == torch.bool
    attends = bool(value) if is_bool else not value <= torch.finfo(mask.dtype).min
    stored = sum(tensor.numel() for tensor in inputs.values()) <= MOST_STORED
    return Counterexample(
        batch=batch,
        head=head,
        query=query,
        key=key,
        attends=attends,
        bias=float(value) if attends and not is_bool and value != 0 else None,
        queries=queries,
        keys=keys,
        sizes=dict(sizes),
        inputs={name: tensor.tolist() for name, tensor in inputs.items()} if stored else {},
    )


def _first(flags: Tensor) -> int | None:
    """The place of the first True of a row."""
    places = flags.nonzero()
    return int(places[0]) if len(places) else None


# -- readable inputs ---------------------------------------------------------------------------------


def _sizes(program: MaskProgram, evaluator: Evaluator, least: int) -> Iterator[dict[str, int]]:
    """Sizes within the profile whose sum is ``least`` or more, ascending: the first few, powers of two, the largest."""
    few = 6 if len(program.symbols) <= 3 else 2
    choices = []
    for low, high in program.ranges(evaluator.ranges).values():
        powers = (2**exponent for exponent in range(3, 23)) if len(program.symbols) <= 2 else ()
        choices.append(sorted({size for size in (*range(low, low + few), *powers, high) if low <= size <= high}))
    for combination in sorted(itertools.product(*choices), key=lambda sizes: (sum(sizes), sizes)):
        if sum(combination) >= least:
            yield dict(zip(program.symbols, combination, strict=True))


def _readable(
    program: MaskProgram, sizes: dict[str, int], most_elements: int, deadline: float, negative: bool = False
) -> Counterexample | None:
    """A counterexample among inputs that a person would think of.

    Where the mask is causal for some plain inputs, one that differs from them a little says most: one token of
    padding, one position that starts again.  Otherwise the plain inputs are the counterexample.
    """
    if program.elements(sizes) > most_elements:
        return None
    names = list(program.inputs)
    plain = [_plain(program.shape(name, sizes), program.inputs[name].dtype) for name in names]
    differing = None
    for combination in itertools.product(*plain):
        base = dict(zip(names, combination, strict=True))
        found = _confirmed(program, sizes, base, most_elements)
        differing = differing or found
        if found:
            if time.perf_counter() > deadline:
                break
            continue
        variants = ({**base, name: varied} for name in names for varied in _variants(base[name], negative))
        for inputs in itertools.islice(variants, MOST_VARIANTS):
            found = _confirmed(program, sizes, inputs, most_elements)
            if found or time.perf_counter() > deadline:
                return found or differing
    return differing


def _plain(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """An input's least surprising contents: positions, all ones, zeros; for floats, nothing or everything blocked."""
    zeros = torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point:
        return [zeros, torch.full_like(zeros, torch.finfo(dtype).min)]
    positions = [torch.arange(shape[-1]).to(dtype).expand(shape).clone()] if shape and dtype != torch.bool else []
    return [*positions, torch.ones_like(zeros), zeros]


def _variants(base: Tensor, negative: bool) -> Iterator[Tensor]:
    """``base`` with a second start somewhere in its rows, one other element, padding on a side; or a -1."""
    length = base.shape[-1] if base.dim() else 0
    signed = base.dtype.is_signed and not base.dtype.is_floating_point
    if signed:
        for start in range(1, length):
            restarted = torch.cat([base[..., :start], base[..., : length - start]], -1)
            if not torch.equal(restarted, base):
                yield restarted
    other = torch.finfo(base.dtype).min if base.dtype.is_floating_point else 1
    flat = base.flatten()
    for place in range(base.numel()):
        yield flat.index_fill(0, torch.tensor(place), other if flat[place] == 0 else 0).reshape(base.shape)
    for start in range(2, length):
        left, right = base.clone(), base.clone()
        left[..., :start] = 0
        right[..., start:] = 0
        yield from (left, right)
    for place in range(base.numel() if signed and negative else 0):
        yield flat.index_fill(0, torch.tensor(place), -1).reshape(base.shape)


# -- text --------------------------------------------------------------------------------------------


def _last_size(value: Any) -> int | None:
    """The innermost length of a nested list; None of a number."""
    if not isinstance(value, list):
        return None
    return _last_size(value[0]) if value and isinstance(value[0], list) else len(value)


def _shown(value: Any) -> str:
    """A nested list as text, the middle of long rows left out where it has more than 64 elements."""
    return str(value) if _count(value) <= MOST_SHOWN else _abbreviated(value)


def _count(value: Any) -> int:
    return sum(map(_count, value)) if isinstance(value, list) else 1


def _abbreviated(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    parts = [_abbreviated(part) for part in value]
    if len(parts) > 8:
        parts = [*parts[:4], "...", *parts[-2:]]
    return f"[{', '.join(parts)}]"
