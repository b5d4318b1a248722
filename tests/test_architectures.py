"""The table of masks across architectures: a part of it is sound, and a wrong class would not go unseen."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.architectures import build
from benchmarks.brute_force import MEANINGS, MaskGraph, Run, confirms, contradiction, describes, runs
from benchmarks.call_forms import FORMS, LONGEST, export
from benchmarks.masks import Cell, CheckedCall, cells, check, markdown
from passes.proof.calls import find_calls
from passes.proof.counterexample import Counterexample
from passes.proof.mask import (
    Arbitrary,
    Bias,
    Causal,
    Chunked,
    Full,
    LowerRight,
    Mask,
    Offset,
    OffsetWindow,
    Packed,
    Padding,
    Ring,
    Window,
)
from passes.proof.masks import Proof, Status
from passes.proof.sizes import symbol_ranges

SOME: tuple[Mask, ...] = (
    Full(), Causal(), LowerRight(), Offset("position", (0,)), OffsetWindow("position", (0,), 5),
    Ring("position", (0,), 5), Window(5), Chunked(4), Padding(), Packed("segments"),
    Bias(), Arbitrary(),
)  # fmt: skip


def proof_of(name: str, status: Status = Status.PROVED) -> Proof:
    """A proof of some mask of the class of that name."""
    return Proof(next(mask for mask in SOME if mask.name == name), status)


FORM = {form.name: form for form in FORMS}


@functools.cache
def checked(architecture: str, form: str, shape: str) -> list[CheckedCall]:
    return check(export(build(architecture), FORM[form], shape), FORM[form], shape)


@pytest.mark.parametrize(
    ("architecture", "form", "shape", "true"),
    [
        ("llama", "ids", "dynamic", ["causal"]),
        ("qwen2", "both", "static", [None]),
        ("gpt2", "attention_mask", "static", [None]),
        ("llama", "dynamic cache, chunk", "dynamic", ["causal_lower_right"]),
        ("llama", "dynamic cache, decode", "static", ["full"]),
        ("gemma3_text", "ids", "static", [None, "causal"]),
        ("gpt_bigcode", "4-D mask", "static", [None]),
        ("llama", "static cache, decode", "static", [None]),
        ("falcon (alibi)", "ids", "static", [None]),
    ],
)
def test_a_part_of_the_table_is_sound_and_complete(
    architecture: str, form: str, shape: str, true: list[str | None]
) -> None:
    calls = checked(architecture, form, shape)
    assert [call.contradiction for call in calls] == [None] * len(true)
    for call, kind in zip(calls, true, strict=True):
        assert call.complete
        assert (call.truths == []) if kind is None else (kind in call.truths and call.proof.mask.name in call.truths)


def test_a_wrong_class_is_contradicted_in_a_real_graph() -> None:
    form, shape = FORM["attention_mask"], "static"
    program = export(build("qwen2"), form, shape)
    (call,) = find_calls(program.graph_module)
    seen = [run for (run,) in runs(MaskGraph(program, [call]), form, shape) if run is not None]
    assert contradiction(proof_of("padding"), seen) is None
    for wrong in (
        "full",
        "causal",
        "causal_lower_right",
        "causal_offset",
        "sliding_window_offset",
        "ring",
        "sliding_window",
        "chunked",
        "packed",
        "bias",
    ):
        assert "brute force disagrees" in str(contradiction(proof_of(wrong), seen)), wrong


def test_a_counterexample_is_run_before_it_is_believed() -> None:
    form, shape = FORM["attention_mask"], "dynamic"
    program = export(build("gpt2"), form, shape)
    graph = MaskGraph(program, find_calls(program.graph_module))
    (length,) = symbol_ranges(program)
    blocked = Counterexample(0, 0, 2, 1, False, None, 3, 3, {length: 3}, {"attention_mask": [[1, 0, 1]]})
    assert confirms(graph, 0, blocked)
    assert not confirms(graph, 0, replace(blocked, inputs={"attention_mask": [[1, 1, 1]]}))
    assert not confirms(graph, 0, replace(blocked, query=1, key=2))


# -- the classes as brute force knows them -----------------------------------------------------------

AT = {length: torch.arange(length) for length in range(1, LONGEST + 1)}


def squares(mask: object) -> list[Run]:
    """``mask(q, k)`` for every square up to ``LONGEST``."""
    found = []
    for at in AT.values():
        attends: Tensor = mask(at[:, None], at[None])  # type: ignore[operator]
        found.append(Run(attends.expand(2, 1, len(at), len(at)), {}))
    return found


EXACT = {
    "full": lambda q, k: (q >= 0) & (k >= 0),
    "causal": lambda q, k: k <= q,
    "sliding_window": lambda q, k: (k <= q) & (q - k < 5),
    "sliding_window_offset": lambda q, k: (k <= q + 2) & (q + 2 - k < 5),
    "ring": lambda q, k: (q + 30 - k) % k.numel() < 5,
    "chunked": lambda q, k: (k <= q) & (q // 4 == k // 4),
    "padding": lambda q, k: (k <= q) & (k != 3),
}
ALMOST = {
    "full": lambda q, k: (q != 11) | (k != 11),
    "causal": lambda q, k: (k <= q) & ((q != 11) | (k != 0)),
    "sliding_window": lambda q, k: (k <= q) & (q - k < torch.where(q == 11, 6, 5)),
    "sliding_window_offset": lambda q, k: (k <= q + 2) & (q + 2 - k < torch.where(q == 11, 6, 5)),
    "ring": lambda q, k: ((q + 30 - k) % k.numel() < 5) & ((q != 11) | (k != 5)),
    "chunked": lambda q, k: (k <= q) & (q // 4 == k // 4) & ((q != 11) | (k != 8)),
    "padding": lambda q, k: (k <= q) & ((k != 3) | (q == 7)),
}


@pytest.mark.parametrize("kind", EXACT)
def test_a_class_that_one_element_contradicts_is_caught(kind: str) -> None:
    assert contradiction(proof_of(kind), squares(EXACT[kind])) is None
    assert contradiction(proof_of(kind), squares(ALMOST[kind])) is not None


def test_a_window_must_have_one_width_at_every_length() -> None:
    wide = squares(EXACT["sliding_window"])
    narrow = squares(lambda q, k: (k <= q) & (q - k < 4))
    assert describes("sliding_window", narrow) and not describes("sliding_window", [*wide, *narrow])


def test_a_mask_that_never_ran_is_not_called_checked() -> None:
    assert contradiction(proof_of("causal"), []) is not None


def test_a_condition_is_tried_on_the_rows_where_it_holds() -> None:
    padded = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    at = torch.arange(4)
    causal = (at <= at[:, None])[None, None] & (padded == 1)[:, None, None, :]
    proof = replace(proof_of("padding"), conditions=("no_padding",))
    assert contradiction(proof, [Run(causal, {"attention_mask": padded})]) is None
    broken = causal.clone()
    broken[0, 0, 3, 0] = False
    assert "no_padding" in str(contradiction(replace(proof, mask=Arbitrary(), status=Status.NOT_PROVED), [
        Run(broken, {"attention_mask": padded})
    ]))  # fmt: skip


def test_additive_masks_count_as_masks_only_where_they_add_nothing_else() -> None:
    at = torch.arange(4)
    lowest = torch.finfo(torch.float32).min
    allowed = (at <= at[:, None])[None, None]
    run = Run(torch.where(allowed, 0.0, lowest), {})
    assert MEANINGS["causal"](run) and not MEANINGS["causal"](Run(torch.where(allowed, 0.0, -1e4), {}))


def test_an_incomplete_and_a_wrong_proof_show_in_the_summary_and_the_document() -> None:
    missed = CheckedCall("call", proof_of("arbitrary", Status.NOT_PROVED), ["causal"])
    wrong = CheckedCall("call", proof_of("full"), [], "called full, and brute force disagrees")
    table = [Cell("llama", form.name, shape, [missed, wrong]) for form in FORMS for shape in form.shapes]
    document = markdown(table)
    assert f"NO, {len(table)} proofs contradicted" in document and f"0 of {len(table)} calls" in document
    assert "| llama | arbitrary (unproved: causal), full |" in document


def test_an_architecture_without_sdpa_has_a_row_that_says_so() -> None:
    row = cells("bloom")
    assert all(cell.reason.startswith("ValueError: BloomForCausalLM does not support") for cell in row)
    document = markdown(row)
    assert "| bloom | — (1) |" in document and f"1. `{row[0].reason}`" in document
