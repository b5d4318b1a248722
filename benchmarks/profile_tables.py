"""Tables of the raw rows in ``benchmarks/profiles``: what the drop-in is worth, where the time of an engine goes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.shown import table as _table
from benchmarks.stacks import aged, caption, environment_of, rows_of
from pipeline.compare.charts import MARGIN, Bar, Chart, Segment, ticks
from pipeline.compare.numbers import number
from pipeline.compare.ratios import ratio
from pipeline.compare.rows import Figure
from pipeline.record import markdown

MODELS = ("llama3_1b", "qwen2_5_0_5b", "qwen3_0_6b")
WAYS = {
    "before": "the script as it is",
    "rewrite": "`rewrite` before an unchanged compile",
    "native_attention": "`rewrite`, and `native_attention`",
    "profiles": "`rewrite`, and a profile for the length",
    "register": "the script as it is, after `register()`",
}
LOGITS = {"all": "logits of every token", "last": "logits of the last token"}


def drop_in(path: Path) -> str:
    """What each way of the front door is worth to a script that compiles a dynamic prompt."""
    rows = rows_of(path)
    text = []
    for model, logits in dict.fromkeys((row["model"], row.get("logits", "all")) for row in rows):
        ways = {row["way"]: row for row in rows if (row["model"], row.get("logits", "all")) == (model, logits)}
        before = ways.get("before")
        lines = [_way(way, ways[way], before) for way in WAYS if way in ways]
        header = ["", "device ms (95 %)", "times as fast (95 %)", "relative error against fp32"]
        if any("first_ms" in row for row in ways.values()):  # while TensorRT-RTX compiles the kernels of the length
            header.append("first passes, ms")
            for line, way in zip(lines, (way for way in WAYS if way in ways), strict=True):
                line.append(f"{ways[way]['first_ms']:.1f}" if "first_ms" in ways[way] else "–")
        own = number(next(iter(ways.values()))["own_relative_error"], 2)
        length = next(iter(ways.values()))["length"]
        on = environment_of(ways.values())
        text.append(
            f"**{model}**, random weights, fp16, a prompt of {length} tokens through an engine for 2 to {length}, "
            f"{LOGITS[logits]}; PyTorch's own error in fp16 is {own}; {caption(on)}.{aged(on)}\n\n"
            + _table(header, lines)
        )
    return "\n".join(text)


def _way(way: str, row: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    if "device_ms" not in row:
        return [WAYS[way], "–", "–", markdown.cell(row["failure"])]
    figure = _figure(row)
    faster = str(ratio([figure], [_figure(before)]).inverse) if before and "device_ms" in before else "–"
    times = f"{number(figure.median, 4)} ({number(figure.low, 4)}–{number(figure.high, 4)})"
    return [WAYS[way], times, "1" if way == "before" else faster, number(row["relative_error"], 2)]


def _figure(row: Mapping[str, Any]) -> Figure:
    return Figure(row["device_ms"]["median"], *row["device_ms"]["ci95"])


Kernel = dict[str, Any]
Roles = tuple[tuple[str, Callable[[str, int], bool]], ...]
NORMED = "AddSqrtDivMulCastReshMul"
"""A row that is normed, times a weight."""
STEP_ROLES: Roles = (
    # By what TensorRT-RTX 1.6 fuses and so calls its kernels; the second argument counts those of one name, the
    # longest first: gate and up are more than query, key and value.
    ("gate and up projections, with the norm", lambda name, nth: nth == 0 and _sum_of(NORMED, name)),
    ("query, key and value projections, with the norm", lambda name, _: _sum_of(NORMED, name)),
    ("down projection, with the activation", lambda name, _: "SiluMulReshMul" in name and _sum_of("", name)),
    ("the product with the vocabulary", lambda name, _: _sum_of("AddSqrtDivMulCastMul", name)),
    ("scores", lambda name, _: name == "MulReshReshMulCastSum"),
    ("softmax, with the mask", lambda name, _: "MaxrSubExp" in name),
    ("weighted values", lambda name, _: name == "ReshReshMulCastSum"),
    ("output projection, with the division", lambda name, _: _sum_of("ReshDivMulCastResh", name)),
    ("rotation of query and key, updates of both caches", lambda name, _: "Scat" in name),
    ("mean squares of the norms, with the residual; the embedding", lambda name, _: "CastMulMean" in name),
    ("everything else", lambda name, _: True),
)
PROMPT_ROLES: Roles = (
    ("matrix products", lambda name, _: name.startswith("cudnn_")),
    ("attention, native and causal", lambda name, _: name.startswith("_gemm_mha")),
    ("gate's activation times up", lambda name, _: name == "SiluMul"),
    ("everything else", lambda name, _: True),
)


def _sum_of(beginning: str, name: str) -> bool:
    """Whether a kernel adds up what ``beginning`` says; what is done to the sums may stand behind."""
    return name.startswith(beginning) and re.search(r"Sum(Add|Cast|Resh|Mul)*$", name) is not None


def by_role(kernels: Iterable[Kernel], roles: Roles) -> dict[str, Kernel]:
    """Microseconds and launches of each role; a kernel is of the first that takes it."""
    sums: dict[str, Kernel] = {role: {"us": 0.0, "launches": 0} for role, _ in roles}
    seen: dict[str, int] = {}
    for kernel in kernels:
        name = _name(kernel)
        nth = seen.get(name, 0)
        seen[name] = nth + 1
        role = next(role for role, takes in roles if takes(name, nth))
        sums[role]["us"] += kernel["us"]
        sums[role]["launches"] += kernel["launches"]
    return sums


def _name(kernel: Kernel) -> str:
    """What TensorRT calls a kernel, without the hash behind it."""
    name: str = kernel["name"]
    if name.startswith(("cudnn_", "_gemm")):
        return name
    return name.removeprefix("__myl_").rpartition("_0x")[0] or name


GROUPS = ("products with the weights", "attention and its cache", "norms and everything else", "gaps between kernels")
"""Of a step's time, in the order in which they are drawn."""
ATTENTION, PRODUCT = (
    re.compile(r"mha|Exp|MulCastSum|Scat"),
    re.compile(r"MulSum|MulCastSlic|gemm|gemv|cudnn|cutlass|sm\d\d_"),
)
"""In names of kernels.  TensorRT's own (``__myl_``) are made of the operations in them: scores and weighted values are
summed in fp32 (``MulCastSum``), what updates the cache scatters, a product with weights ends in ``MulSum`` or is summed
in slices."""


def by_group(profile: Mapping[str, Any]) -> dict[str, float]:
    """Microseconds of a step by :data:`GROUPS`; the time between its kernels is what the step takes beyond them."""
    sums = dict.fromkeys(GROUPS, 0.0)
    for kernel in profile["kernels"]:
        name = kernel["name"]
        sums[GROUPS[0 if PRODUCT.search(name) else 2] if not ATTENTION.search(name) else GROUPS[1]] += kernel["us"]
    sums[GROUPS[3]] = max(0.0, (profile["step_us"] or 0.0) - profile["kernels_us"])
    return sums


def steps(folder: Path) -> str:
    """Where the time of a decode step goes, us (launches)."""
    found = profiles(folder, "decode")
    groups = {model: by_group(profile) for model, profile in found.items()}
    lines = [
        [f"**{group}**", *(f"{groups[model][group]:.0f} ({_share(groups[model], group)})" for model in found)]
        for group in GROUPS
    ]
    lines += _roles(found, STEP_ROLES, "{us:.1f} ({launches})")
    lines.append(["sum of all kernels", *(f"{p['kernels_us']:.0f} ({p['launches']})" for p in found.values())])
    lines.append(["as a CUDA graph", *(_us(profile["step_us"]) for profile in found.values())])
    earlier = {
        "head_alone": "an earlier step: the product with the vocabulary has one row (`*-decode-head_alone.json`)",
        "powers": "the one before that: squares are written as powers (`*-decode-powers.json`)",
    }
    lines += _others(folder, "decode", earlier, found)
    return _table(("one token, us (share; launches)", *found), lines)


STEP_CSS = dict(zip(GROUPS, ("engine", "stage-strategy", "stage-lower", "rival"), strict=True))


def step_chart(found: Mapping[str, Any]) -> Chart:
    """A bar for each model, in pieces by :data:`GROUPS`."""
    groups = {model: by_group(profile) for model, profile in found.items()}
    longest = max(sum(each.values()) for each in groups.values()) * MARGIN
    bars = []
    for model, each in groups.items():
        start, segments = 0.0, []
        for group, us in each.items():
            width = 100 * us / longest
            segments.append(Segment(start, width, STEP_CSS[group], f"{group}: {us:.0f} us, {_share(each, group)}"))
            start += width
        bars.append(Bar(model, f"{sum(each.values()):.0f} us", segments))
    axis = [(100 * tick / longest, f"{tick:g}") for tick in ticks(longest)]
    return Chart("One token", "us", "", bars, axis)


def _share(groups: Mapping[str, float], group: str) -> str:
    return f"{groups[group] / sum(groups.values()):.0%}"


UNKNOWN, LEAST = 0.25, 0.03
"""Of the time of all kernels: with more than so much in no role, names say more than roles do; of those with less than
so much no name is shown."""


def _roles(found: Mapping[str, Any], roles: Roles, shown: str) -> list[list[str]]:
    """A line for each role that a kernel has; where the roles, which go by names, miss too much, one for each name."""
    sums = {model: by_role(profile["kernels"], roles) for model, profile in found.items()}
    rest = roles[-1][0]
    if any(sums[model][rest]["us"] > UNKNOWN * profile["kernels_us"] for model, profile in found.items()):
        every = [(_name(k), k["us"] / profile["kernels_us"]) for profile in found.values() for k in profile["kernels"]]
        names = dict.fromkeys(name for name, share in every if share > LEAST)
        roles = tuple((f"`{name}`", lambda one, _, name=name: one == name) for name in names) + roles[-1:]
        sums = {model: by_role(profile["kernels"], roles) for model, profile in found.items()}
    return [
        [role, *(shown.format(**sums[model][role]) for model in found)]
        for role, _ in roles
        if any(each[role]["launches"] for each in sums.values())
    ]


def _others(folder: Path, part: str, names: Mapping[str, str], models: Iterable[str]) -> Iterator[list[str]]:
    """A line for each variant that was profiled as well."""
    for name, what in names.items():
        times = [_step_us(folder / f"{model}-{part}-{name}.json") for model in models]
        if set(times) != {"–"}:
            yield [what, *times]


def prompts(folder: Path) -> str:
    """Where the time of a prompt that fills the cache goes, us."""
    found = profiles(folder, "prompt")
    lines = _roles(found, PROMPT_ROLES, "{us:.0f}")
    lines.append(["sum of all kernels", *(f"{p['kernels_us']:.0f}" for p in found.values())])
    lines.append(["as a CUDA graph, back to back", *(_us(profile["step_us"]) for profile in found.values())])
    every = {"every_row": "the same with every row of the last layer (`*-prompt-every_row.json`)"}
    lines += _others(folder, "prompt", every, found)
    return _table(("a prompt, us", *found), lines)


def _where(rows: Iterable[Mapping[str, Any]], otherwise: str) -> str:
    on = environment_of(rows)
    return f"{caption(on) if on else otherwise}.{aged(on)}"


def prompt_attention(path: Path, where: str) -> str:
    """Microseconds a layer of causal attention over a whole prompt, by form and model; ``where``: what rows of no
    environment were measured on."""
    every = rows_of(path)
    rows = [row for row in every if "us" in row]
    times = {(row["form"], row["model"]): row["us"] for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [
        [f"`{form}`", *(f"{times[form, m]:.1f}" if (form, m) in times else "–" for m in models)]
        for form in dict.fromkeys(row["form"] for row in rows)
    ]
    return f"{_where(every, where)}\n\n" + _table(("attention of a prompt, us a layer", *models), lines)


def profiles(folder: Path, part: str) -> dict[str, Any]:
    """Of ``decode`` or ``prompt``, by model."""
    paths = {model: folder / f"{model}-{part}.json" for model in MODELS}
    return {model: json.loads(path.read_text(encoding="utf-8")) for model, path in paths.items() if path.exists()}


def _step_us(path: Path) -> str:
    return _us(json.loads(path.read_text(encoding="utf-8"))["step_us"]) if path.exists() else "–"


def _us(time: float | None) -> str:
    return "–" if time is None else f"{time:.0f}"
