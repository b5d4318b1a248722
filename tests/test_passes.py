"""The list of passes: what runs, in which order, what is left out, and that the answers stay."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from test_unread import last_rows

import passes
from passes.errors import UserError
from passes.graph import driver
from passes.graph.passes import PASSES
from passes.graph.rewrite import rewrite
from passes.tensorrt import network_passes
from pipeline.config.choices import OPTIONAL_PASSES
from pipeline.config.schema import StrategyConfig
from pipeline.engine.network import ours
from pipeline.engine.programs import dropped

EVERY = ["prepare", "write_out_complex", "prove", "group_heads", "lower_attention", "narrow_rows", "remove_dead_code"]


def test_every_pass_is_reported_in_its_order_with_what_it_changed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="passes.graph.driver"):
        done = rewrite(last_rows("llama"), "detect_causal", "mask").passes
    changed = {each.name: each.changed for each in done}
    assert list(changed) == EVERY
    assert (changed["group_heads"], changed["lower_attention"]) == (2, 2)
    assert changed["narrow_rows"] > 0 and changed["remove_dead_code"] > 10, "the masks' graphs are gone"
    assert "4 of 7, group_heads: 2 changed" in caplog.text


@pytest.mark.parametrize("left_out", driver.optional(PASSES))
def test_a_pass_that_is_left_out_did_nothing_and_the_answers_stay(left_out: str) -> None:
    program = last_rows("llama")
    tokens = tiny.tokens(1, 11)
    wanted = tiny.logits(program, input_ids=tokens)

    done = rewrite(program, "detect_causal", "mask", without=[left_out])

    assert [each.name for each in done.passes] == [name for name in EVERY if name != left_out]
    shown = {
        "group_heads": not any(call.native_gqa for call in done.calls),
        "narrow_rows": done.narrowed == 0,
    }
    assert [name for name, missing in shown.items() if missing] == [left_out]
    torch.testing.assert_close(tiny.logits(done.program, input_ids=tokens), wanted)


def test_what_the_settings_know_is_what_may_be_left_out() -> None:
    optional = (*driver.optional(PASSES), *driver.optional(network_passes.PASSES))
    assert optional == OPTIONAL_PASSES
    left = [each.name for each in ours(without=OPTIONAL_PASSES).passes]
    assert left == ["write_known_sizes", "share_weights"] and len(ours().passes) == 7


def test_a_pass_that_is_none_is_refused_in_one_line() -> None:
    program = tiny.traced("llama").program
    with pytest.raises(UserError, match="without=prove: allowed: group_heads, narrow_rows"):
        passes.rewrite(program, without=["prove"])


@pytest.mark.parametrize(
    ("inputs", "changes", "hint"),
    [
        (("attention_mask",), {}, "2 masks stay, and could go if the attention mask is all ones, always: "
         "strategy.assume=[no_padding]"),
        (("position_ids",), {}, "2 masks stay, and could go if positions rise by one from token to token, always: "
         "strategy.assume=[contiguous_positions]"),
        (("attention_mask",), {"sliding_window": 8}, None),
        ((), {}, None),
    ],
    ids=["padding", "packed", "a window beside padding", "nothing stays"],
)  # fmt: skip
def test_what_alone_stands_between_a_mask_and_causal_is_said_with_what_to_type(
    inputs: tuple[str, ...], changes: dict[str, int], hint: str | None
) -> None:
    name = "mistral" if changes else "llama"
    program = tiny.traced(name, inputs=("input_ids", *inputs), **changes).program
    notes = list(dropped(rewrite(program, "detect_causal", "mask"), StrategyConfig("detect_causal")))
    assert notes == ([] if hint is None else [hint])
