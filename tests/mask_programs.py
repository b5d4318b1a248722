"""Random programs that make attention masks: straight-line code, in which every statement is one operation on the
values before it and every table is a mask.

A statement is text, so that a failure is a few lines that can be pasted.  ``q`` [L, 1] and ``k`` [1, S] are the places
of queries and keys; ``ids`` (int64 [S]), ``keep`` (bool [S]) and ``t`` (int64 []) are run-time inputs.  Programs stay
near to causal and full masks, because what is far from them tempts no prover.
"""

from __future__ import annotations

from string import Formatter
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


class Statement(NamedTuple):
    name: str
    """Its first letter is the kind: r integers [L, 1], c integers [1, S], m bool [L, S], f float [L, S], and w a mask
    of any rank and size, which attention may have to broadcast, or refuse."""
    text: str
    reads: tuple[str, ...]
    """The statements whose values it reads."""

    @property
    def is_mask(self) -> bool:
        return self.name[0] in "mfw"


Program = tuple[Statement, ...]

SMALL, DIVISOR, BIT = st.integers(-3, 9), st.integers(1, 9), st.integers(0, 1)
CONSTANTS: dict[str, st.SearchStrategy[Any]] = {
    "small": SMALL, "other": SMALL, "divisor": DIVISOR, "bit": BIT, "diagonal": st.integers(-2, 2),
    "bool": st.booleans(), "apart": st.sampled_from([2, 3, 12]),
    "five": st.one_of(st.sampled_from([[0, 1, 2, 3, 4], [3] * 5]), st.lists(SMALL, min_size=5, max_size=5)),
    "wide": st.sampled_from([-256, -129, -128, 3, 5, 127, 128, 255, 256, 258, 65536, 2**31, 2**32]),
    "narrow": st.sampled_from(["int8", "uint8", "int16", "int32", "int64"]),
    "is": st.sampled_from(["<=", "<", ">=", ">", "==", "!="]),
    "block": st.sampled_from(["-inf", "-inf", "LEAST", "LEAST", "-1e4", "-1e5", "inf", "-1.0", "0.0", "-0.0"]),
    "float": st.sampled_from(["float16", "bfloat16", "float64"]),
    "number": st.sampled_from(["0.0", "-1.0", "1.0", "0.5", "2.0", "-inf", "1e38", "LEAST"]),
    "share": st.sampled_from([2, -0.5, 1e-38]),
}  # fmt: skip

# {v} and {w} are two rows or two columns.
ROW = {"axis": 0, "places": "q", "size": "L", "first": "[:1]", "others": "[1:]", "line": "[:, 0]"}
COLUMN = {"axis": 1, "places": "k", "size": "S", "first": "[:, :1]", "others": "[:, 1:]", "line": "[0]"}
INTEGERS = (
    "{v} + {small}", "{small} - {v}", "{v} * {small}", "{v} - {w}", "torch.add({v}, {w}, alpha={small})",
    "torch.rsub({v}, {w}, alpha={small})", "torch.rsub({v}, {small}, alpha={other})", "{v} // {divisor}",
    "{v} % {divisor}", "{v} // {wide}", "{v} % {wide}", "torch.div({v}, {divisor}, rounding_mode='trunc')",
    "torch.div({v}, {divisor}, rounding_mode='floor')", "{v}.clamp({small}, {other})", "{v}.clamp(min={small})",
    "{v}.clamp(max={small})", "torch.minimum({v}, {w})", "torch.maximum({v}, {w})",
    "torch.minimum({v}, torch.tensor({wide}))", "{v}.flip({axis})", "{v}.abs()", "-{v}", "{v}.to(torch.{narrow})",
    "torch.where({v} {is} {small}, {v}, {w})", "{v}.masked_fill({w} {is} {other}, {small})", "{v}.cummax({axis})[0]",
    "{v}.cummin({axis})[0]", "{v}.cumsum({axis})", "({v} >= {w}).cumsum({axis})",
    "torch.diff({v}, dim={axis}, prepend={w}{first})",
    "{v}.index_select({axis}, ({places} + {small}).clamp(0, {size} - 1){line})",
    "torch.cat([{v}{others}, {w}{first}], {axis})", "torch.cat([{v}{first}, {w}{others}], {axis})",
    "torch.tensor({five})[{v}.clamp(0, 4)]", "{v}.gather({axis}, {w}.clamp(0, {size} - 1).long())",
    "torch.arange({small}, {small} + {size}, dtype=torch.{narrow}).reshape({places}.shape)",
    "torch.arange({small}, {small} + 2 * {size}, 2).reshape({places}.shape)",
    "torch.arange({size} - 1, -1, -1).reshape({places}.shape)", "{v} + t",
    "torch.zeros_like({v}) + t.clamp(0, {divisor})", "torch.full_like({v}, {small})",
)  # fmt: skip
TABLES = (
    "{r} {is} {c}", "{c} {is} {r}", "({r} {is} {small}).expand(L, S)", "({c} {is} {wide}).expand(L, S)",
    "({c} {is} {small}).expand(L, S)", "({c}.to(torch.{narrow}) {is} torch.tensor({wide})).expand(L, S)",
    "({r}.to(torch.{narrow}) {is} {wide}).expand(L, S)", "{c} + {r} {is} {small}",
    "({c} - {r}) // {divisor} {is} {small}", "({c} - {r}) % {divisor} {is} 0",
    "{c} // {divisor} {is} {r} // {divisor}", "({r} - {c}).clamp({small}, {other}) {is} {small}",
    "{m} & ({r} >= {small})", "{m} & ({c} != {small})", "{m} | (({r} == {small}) & ({c} == {other}))", "{m} & {n}",
    "{m} & {n}", "{m} | {n}", "{m} | {n}", "{m} ^ {n}", "~{m}", "torch.logical_not({m}.long())", "{m} & ({m} | {n})",
    "{m} | ({m} & {n})", "{m} ^ {n} ^ {n}", "torch.where({n}, {m}, {m})", "({m} & {n}) | ({m} & ~{n})",
    "torch.where({m}, {n}, {o})", "torch.where({m}, True, {n})", "{m}.masked_fill({n}, {bool})",
    "{m}.tril({diagonal})", "{m}.triu({diagonal})", "{m}.flip({bit})", "{m}.flip(0).flip(1)",
    "{m} | ~{m}.any({bit}, keepdim=True)", "{m} | ~{n}.any({bit}, keepdim=True)",
    "{m} & {n}.all({bit}, keepdim=True)", "{m} & {n}.any({bit}, keepdim=True)", "torch.stack([{m}, {n}]).any(0)",
    "torch.stack([{m}, {n}]).all(0)", "torch.stack([{m}, {n}], 2)[..., {bit}]",
    "torch.stack([{m}, {n}], 1).select(1, {bit})", "torch.cat([{m}[:1], {n}[1:]])", "torch.cat([{m}[:2], {n}[2:]])",
    "torch.cat([{m}[:, :1], {n}[:, 1:]], 1)", "torch.cat([{m}[:, 1:], {n}[:, :1]], 1)",
    "torch.constant_pad_nd({m}[1:], (0, 0, 1, 0), {bool})", "torch.constant_pad_nd({m}, (-1, 1), {bool})",
    "torch.constant_pad_nd({m}, (1, -1, 1, -1), {bool})", "{m}[(q + {diagonal}).clamp(0, L - 1), k]",
    "{m}[:, (k + {diagonal}).clamp(0, S - 1)[0]]", "{m}[{r}.clamp(0, L - 1).long(), {c}.clamp(0, S - 1).long()]",
    "{m}.gather(1, {c}.clamp(0, S - 1).long().expand(L, S))",
    "{m}.gather(1, {r}.clamp(0, S - 1).long().expand(L, S))", "{m}.reshape(1, L * S).reshape(L, S)",
    "{m}.repeat(2, 1, 1)[{bit}]", "{m}[None].permute(1, 2, 0).squeeze(2)", "{m}[:, :, None].expand(L, S, 2)[..., 1]",
    "{m}[::1]", "{m}[-L:]", "{m}.T.contiguous().T", "torch.slice_scatter({m}, {n}[1:], 0, 1)",
    "torch.slice_scatter({m}, {n}[:, 2:], 1, 2)", "({m}.to(torch.{narrow}) - 1).clamp(0) == {bit}",
    "{m}.to(torch.{narrow}) + {n}.to(torch.{narrow}) {is} {bit}", "{m} & keep[None]", "{m} | keep[S - L:, None]",
    "{m} & (ids[None] == ids[S - L:, None])", "{m} & (ids[None] <= ids[S - L:, None])", "{f} {is} {number}",
    "{f} {is} {number}", "{f} {is} {g}", "{f}.isinf()", "{f}.bool()",
)  # fmt: skip
ADDED = (
    "torch.where({m}, 0.0, {block})", "torch.where({m}, 0.0, {block})", "torch.where({m}, {block}, 0.0)",
    "torch.zeros(L, S).masked_fill(~{m}, {block})", "torch.zeros(L, S).masked_fill(~{m}, {block})",
    "(1.0 - {m}.float()) * {block}", "torch.full((L, S), {block}).triu({bit})", "{m}.float() - 1.0",
    "{m}.float().log()", "{f} + {g}", "{f} - {g}", "{f} * {number}", "{f} * {g}", "-{f}", "torch.minimum({f}, {g})",
    "torch.maximum({f}, {g})", "torch.floor_divide({f}, {g})", "torch.remainder({f}, {g})", "{f} / {share}",
    "{f}.to(torch.{float}).float()", "{f}.clamp(min={number})", "{f}.clamp({number}, 0.0)", "{f}.exp() - 1",
    "{f}.abs()", "torch.where({m}, {f}, {g})", "{f}.masked_fill({m}, {block})", "{f}.tril()", "{f}.triu(1)",
    "{f}.flip(1)", "torch.cat([{f}[:, :1], {g}[:, 1:]], 1)", "torch.where({f} {is} {number}, {f}, {g})", "{f}.relu()",
    "torch.add({f}, {g}, alpha={small})", "torch.rsub({f}, {g}, alpha={small})",
    "torch.where({f}.isnan(), {f}, {g})", "{m} * {f}",
)  # fmt: skip
MIXED = (
    "({m} + {c}) {is} {r}", "{m} * {c} {is} {r}", "({c} + {number}) {is} {r}", "{c}.to(torch.{float}) {is} {r}",
    "({c}.to(torch.{narrow}) + {m}) {is} {r}",
    "({c} + {wide}).to(torch.{float}) {is} ({r} + {wide}).to(torch.{float})",
    "torch.where({m}, {c}, {r}) {is} {c}", "torch.where({m}, {c}.to(torch.{narrow}), {r}) {is} {number}",
    "torch.minimum({c}.to(torch.{narrow}), {r}) {is} {c}", "{m} <= {n}", "({c} {is} {r}) {is} {m}",
    "{c}.to(torch.{narrow}) {is} {r}.to(torch.{float})", "torch.where({m}, {f}, {c}) {is} {number}",
)  # fmt: skip
MIXED_ADDED = (
    "torch.where({m}, 0, {f})", "torch.where({m}, {f}, {small})", "{f} + {m}", "{f} * {c}.to(torch.{narrow})",
    "{f}.to(torch.{float}) + {g}", "torch.where({m}, {c}.to(torch.{narrow}) * 0, {f})",
)  # fmt: skip
BROADCAST = (
    "{m}[None, None]", "{m}[None].expand(2, L, S)", "{m}[None, None].expand(2, 2, L, S)", "{f}[None, None]",
    "torch.stack([{m}, {m}])", "torch.stack([{m}, {n}])", "torch.stack([{m}, {m}])[None]",
    "torch.stack([{m}, {n}])[None]", "torch.stack([{m}, {m}])[:, None]", "torch.stack([{m}, {n}])[:, None]",
    "torch.stack([{m}, {m}, {m}])[None]", "torch.stack([{m}, {m}, {m}, {n}]).reshape(2, 2, L, S)",
    "torch.stack([{m}, {n}])[None].all(1, keepdim=True)", "torch.stack([{f}, {f}])[None]",
    "torch.stack([{f}, {g}])[None]", "torch.stack([{f}, {f}])[:, None]", "torch.stack([{f}, {g}])[:, None]",
    "{m}[None, None] & torch.tensor([True, {bool}])[:, None, None]",
    "{m}[None, None] & torch.tensor([{small}, 2])[:, None, None, None] {is} 0",
    "torch.where(torch.stack([{m}, {n}])[:, None], 0.0, {block})", "torch.where({m}[None], {f}[None, None], {block})",
    # torch.export refuses a size that is 1 at some lengths only: these are at every length of the tests, or at none.
    "torch.stack([{m}, {n}])[torch.arange(L // {apart} + 1) % 2]",
    "torch.stack([{m}, {m}])[None, torch.arange(L // {apart} + 1) % 2]",
    "torch.stack([{m}, {n}])[torch.arange(L // {apart} + 1) % 2, None]",
    "torch.stack([{f}, {g}])[None, torch.arange(L // {apart} + 1) % 2]",
    "{m}[torch.arange(L // {apart} + 1).clamp(max=2)]", "{m}[:, torch.arange(S // {apart} + 1).clamp(max=2)]",
    "{m}[:1]", "{m}[-1:]", "{m}[:, :1]", "{m}[:, -1:]",
    "{m}[0]", "{f}[:1]", "{f}[:, :1]", "torch.ones(L // {apart} + 1, S, dtype=torch.bool).tril()", "{m}[:1, :1]",
    "torch.zeros(L // {apart} + 1, S)", "torch.ones(1, S // {apart} + 1, dtype=torch.bool)",
)  # fmt: skip
FIRST = {
    "r": ("q", "q + (S - L)", "ids[S - L:, None]", "ids[S - L:, None].clamp(0, 5)"),
    "c": ("k", "k - (S - L)", "ids[None]", "keep[None].long()"),
    "m": (
        "k <= q", "q >= k", "torch.ones(L, S, dtype=torch.bool).tril()", "k - q < 1", "k <= q + (S - L)",
        "torch.full((L, S), True)", "k - q < S", "k < q", "q <= k", "k > q - 3", "q - k < 8", "k // 3 == q // 3",
        "k <= q + t",
    ),
    "f": ("torch.where(k <= q, 0.0, -inf)", "torch.zeros(L, S)"),
    "w": ("(k <= q)[None, None]", "torch.stack([k <= q, k <= q])[None]"),
}  # fmt: skip
START = tuple(Statement(f"{kind}{place}", text, ()) for kind in FIRST for place, text in enumerate(FIRST[kind]))
TEMPLATES = {
    "m": st.sampled_from((*TABLES, *MIXED)),
    "f": st.sampled_from((*ADDED, *MIXED_ADDED)),
    "w": st.sampled_from(BROADCAST),
}
GOOD = 4
"""How many of the first of a kind are drawn as often as all others together."""


@st.composite
def programs(draw: st.DrawFn, statements: int) -> Program:
    """``START`` and ``statements`` more."""
    found = list(START)
    for _ in range(statements):
        kind = draw(st.sampled_from("rrccmmmmmmfffwwww"))
        template = draw(TEMPLATES.get(kind, st.sampled_from(INTEGERS)))
        parts: dict[str, Any] = dict(ROW if kind == "r" else COLUMN)
        reads = []
        for field in sorted({field for _, field, _, _ in Formatter().parse(template) if field} - set(parts)):
            if field in CONSTANTS:
                parts[field] = draw(CONSTANTS[field])
                continue
            of = {"v": kind, "w": kind, "n": "m", "o": "m", "g": "f"}.get(field, field)
            names = [statement.name for statement in found if statement.name[0] == of]
            parts[field] = draw(st.sampled_from(names[:GOOD]) | st.sampled_from(names))
            reads.append(parts[field])
        number = sum(statement.name[0] == kind for statement in found)
        found.append(Statement(f"{kind}{number}", template.format(**parts), tuple(reads)))
    return tuple(found)


def needed(program: Program, name: str) -> Program:
    """The statements that make ``name``."""
    wanted = {name}
    for statement in reversed(program):
        if statement.name in wanted:
            wanted.update(statement.reads)
    return tuple(statement for statement in program if statement.name in wanted)


def listing(program: Program) -> str:
    return "; ".join(f"{name} = {text}" for name, text, _ in program)


def values(program: Program, queries: Any, keys: Any, ids: Tensor, keep: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Every statement's value; raises what PyTorch raises where it refuses one."""
    names: dict[str, Any] = {
        "torch": torch, "inf": float("inf"), "LEAST": torch.finfo(torch.float32).min, "L": queries, "S": keys,
        "q": torch.arange(queries)[:, None], "k": torch.arange(keys)[None], "ids": ids, "keep": keep, "t": t,
    }  # fmt: skip
    for name, text, _ in program:
        names[name] = eval(text, names)
    return {name: names[name] for name, _, _ in program}


def without_refused(program: Program, queries: int, keys: int, *inputs: Tensor) -> Program:
    """``program`` without the statements that PyTorch refuses, and those that read them."""
    kept: list[Statement] = []
    names: set[str] = set()
    state: dict[str, Any] = {}
    for statement in program:
        if not names.issuperset(statement.reads):
            continue
        try:
            state = values((*kept, statement), queries, keys, *inputs)
        except (RuntimeError, IndexError):
            continue
        wanted = {"r": (queries, 1), "c": (1, keys), "w": state[statement.name].shape}
        if state[statement.name].shape == wanted.get(statement.name[0], (queries, keys)):
            kept.append(statement)
            names.add(statement.name)
    return tuple(kept)
