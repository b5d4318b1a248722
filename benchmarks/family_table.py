"""The table of families: every decoder that transformers can build from a tiny config, in every form that is run.

python -m benchmarks.family_table                     # what is missing in families.jsonl, then what is made of it
python -m benchmarks.family_table --only llama,gpt2   # a part of it
python -m benchmarks.family_table --again gemma2      # these rows anew; also crashed, refused, ...: all of that outcome
python -m benchmarks.family_table --no-runs           # docs/architectures.md and the README's line alone

Each row is a run of the pipeline in a process of its own, with a time limit; whatever ends the command, the same
command goes on with it.  All of it takes some hours of one core.  Exit code 1 where a family is wrong, crashed or timed
out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import family_runs
from benchmarks.families import NAMED, names
from benchmarks.family_runs import CRASHED, FORMS, LATE, NONE, REFUSED, RIGHT, STOPPED, WRONG, Row, to_json, versions

Rows = dict[tuple[str, str], Row]
"""By family and form."""
ROWS = Path(__file__).resolve().parent / "families.jsonl"
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
README = DOCUMENT.parent.parent / "README.md"
MARKS = "<!--families:made-->", "<!--end-->"
LIMIT_S = 300.0
"""Seconds that a run may take."""
ORDER = ("generation", "padded prompt", "prompt")
"""The form that tells most comes first."""
NO_CACHE = "refused with a KV cache"
ONE_LENGTH = "right with a KV cache"
OUTCOMES = (RIGHT, REFUSED, STOPPED, WRONG, CRASHED, LATE, NONE)
FAST = ("native_causal", "native_full", "native_window", "native_chunks", "cached")
"""Actions of an attention call that read no mask and no more keys than they must."""
WORDS = {"native_mask": "mask read", "decomposed": "written out", "untouched": "written out"}


def read(path: Path = ROWS) -> Rows:
    """The rows that are kept, by family and form."""
    if not path.is_file():
        return {}
    rows = (Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line)
    return {(made.family, made.form): made for made in rows}


def write(rows: Rows, path: Path = ROWS) -> None:
    """Keep ``rows``, a line each, in the order of the document."""
    order = [(family, form) for family in names() for form in FORMS]
    kept = sorted((key for key in rows if key in order), key=order.index)
    path.write_text("".join(json.dumps(to_json(rows[key])) + "\n" for key in kept), encoding="utf-8")


def in_a_process(family: str, form: str, limit_s: float = LIMIT_S) -> Row:
    """The row of ``family`` in ``form``, which may crash, hang or eat up the memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.run", "torch", "transformers", "mlflow"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, family, form), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(limit_s):
            return Row(family, form, LATE, f"longer than {limit_s:.0f} s", seconds=limit_s, versions=versions())
        made: Row = here.recv()
        return made
    except EOFError:
        process.join()
        return Row(family, form, CRASHED, f"its process ended with {process.exitcode}", versions=versions())
    finally:
        process.kill()
        process.join()


def _send(there: Connection, family: str, form: str) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    there.send(family_runs.row(family, form))


def slow(made: Row) -> list[str]:
    """What of ``made``, which is right, has no fast kernel of its own, in words."""
    found = []
    for program, calls in made.masks.items():
        for call in calls:
            mask, action = call.split(" x ")[1].split(" (")[0], call.rsplit(": ", 1)[1]
            if action not in FAST:
                found.append(f"{program}: {mask.replace('_', ' ')}, {WORDS.get(action, action)}")
    found += [f"{each}, no fused kernel" for each in made.unfused]
    for program, calls in made.masks.items():
        if not calls and made.written_out:
            found.append(f"{program}: attention written out by the model")
    return list(dict.fromkeys(found))


def cell(made: Row | None, reasons: dict[str, int]) -> str:
    if made is None:
        return "not run"
    if made.outcome == RIGHT:
        return "; ".join(slow(made)) or "fast"
    return f"{made.outcome} ({reasons.setdefault(made.reason, len(reasons) + 1)})"


def standing(rows: Iterable[Row]) -> str:
    """What a family is in one word: of its forms, the one that is worst off."""
    outcomes = [("slower" if slow(made) else "fast") if made.outcome == RIGHT else made.outcome for made in rows]
    return min(outcomes, key=(CRASHED, WRONG, LATE, NONE, REFUSED, STOPPED, "slower", "fast").index)


def in_short(rows: Rows) -> str:
    """The README's line: how many of the named families are fast, and which are right but slower, or do not run.  What
    has a window, or other positions, of the same model type goes by its name where it fares as that does.  Padding is
    left out: it is a mask to be read, in every family."""
    found: dict[str, dict[str, None]] = {}
    for family in NAMED:
        if made := [rows[family, form] for form in ("prompt", "generation") if (family, form) in rows]:
            kind, refused = standing(made), {each.form for each in made if each.outcome == REFUSED}
            if kind == REFUSED and len(refused) == 1:
                kind = NO_CACHE if refused == {"generation"} else ONE_LENGTH
            found.setdefault(kind, {})[family.replace(" (alibi)", "-alibi").split(" (")[0]] = None
    says = [f"{len(found.pop('fast', ()))} fast"]
    words = {"slower": "slower in some layers"}
    says += [f"{words.get(kind, kind)}: {', '.join(found[kind])}" for kind in sorted(found, key=_ORDER.index)]
    return f"Families ([table, reasons](docs/architectures.md)): {'; '.join(says)}.\n"


_ORDER = ("slower", ONE_LENGTH, NO_CACHE, STOPPED, REFUSED, NONE, LATE, WRONG, CRASHED)


TEXT = """# Families of decoders

Which Hugging Face decoders run, which of them fast, and why others do not: tiny random models of every class that
transformers has for causal language modelling, each through the pipeline as a folder of your own would be.

* An engine is built ahead of time (fp16), and the graph that it was made from is compared with PyTorch, at lengths from
  {least} to {most} tokens. Windows and chunks are of 16 tokens; rotary factors that hang on the length change at 24.
* *generation* has a KV cache in the engine: a prompt and 8 tokens, each compared, and longer texts forced through it;
  of a family with layers that recur up to 150 tokens, whose prompts run in chunks of 128.
* `fast`: every attention call has a fused kernel and reads no mask. A cell that names calls is right, and says which of
  them do not: a mask that is read, attention that is written out, a layer without a fused kernel. *prompt* is the
  program that runs a prompt, *step* the one that runs each token after it.
* `refused`: before anything is built; `stopped`: later. A number says below what the run says then.

Attention sinks (GPT-OSS) become a key of their own; a soft cap (Gemma 2) and alibi of the model's own making (BLOOM,
MPT) stay written out. Mixtures of experts are products over every expert, or over the chosen ones where those are
fewer. What the masks of a graph are in every way that a model is called is in [masks by call](masks-by-call.md).

Made by `python -m benchmarks.family_table` with {stack}: {families} families, {built} of them built.

| form | {outcomes} |
|{lines}
"""


def markdown(rows: Rows) -> str:
    """The document."""
    families = list(dict.fromkeys(family for family, _ in rows))
    kinds = [kind for kind in OUTCOMES if any(made.outcome == kind for made in rows.values())]
    counts = {form: Counter(made.outcome for (_, each), made in rows.items() if each == form) for form in FORMS}
    summary = ["---|" * (len(kinds) + 1)]
    summary += [f"| {form} | {' | '.join(str(counts[form][kind]) for kind in kinds)} |" for form in FORMS]
    least, most = (option.split("=")[1] for option in (family_runs.LENGTHS[0], family_runs.LENGTHS[2]))
    head = TEXT.format(
        least=least, most=most, stack="; ".join(sorted({made.versions for made in rows.values()})),
        families=len(families), built=len({family for (family, _), made in rows.items() if made.outcome != NONE}),
        outcomes=" | ".join(kinds), lines="\n".join(summary),
    )  # fmt: skip
    reasons: dict[str, int] = {}
    table = [
        f"| {family} | {' | '.join(cell(rows.get((family, form)), reasons) for form in FORMS)} |\n"
        for family in families
    ]
    why = [f"{number}. `{reason.replace('`', chr(39))}`\n" for reason, number in reasons.items()]
    title = f"\n| family | {' | '.join(FORMS)} |\n|{'---|' * (len(FORMS) + 1)}\n"
    return "".join([head, title, *table, *(["\n## Why not\n\n", *why] if why else [])])


def with_line(readme: str, rows: Rows) -> str:
    """``readme`` with the line that is made of ``rows``."""
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{in_short(rows)}{MARKS[1]}{after}"


def wanted(asked: argparse.Namespace, rows: Rows) -> Iterator[tuple[str, str]]:
    """Families and forms that are to be run; the named ones first."""
    again = set(filter(None, asked.again.split(",")))
    families = asked.only.split(",") if asked.only else names()
    for part in ([each for each in families if each in NAMED], [each for each in families if each not in NAMED]):
        for form in ORDER:
            for family in part:
                made = rows.get((family, form))
                if made is None or again & {family, made.outcome, "all"}:
                    yield family, form


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--again", default="", help="families, or outcomes such as crashed; all: every row")
    parser.add_argument("--no-runs", action="store_true", help="write the document from the rows that are kept")
    parser.add_argument("--rows", type=Path, default=ROWS, help=f"where rows are kept; {ROWS.name}")
    parser.add_argument("--to", type=Path, default=DOCUMENT, help=f"the document; {DOCUMENT.name}")
    asked = parser.parse_args()
    known = names()
    for name in filter(None, asked.only.split(",")):
        if name not in known:
            parser.error(f"--only={name}: must be of {', '.join(known)}")
    rows = read(asked.rows)
    for family, form in [] if asked.no_runs else list(wanted(asked, rows)):
        made = rows[family, form] = in_a_process(family, form)
        print(f"{family:24} {form:14} {made.outcome:13} {made.seconds:6.1f} s  {made.reason}", flush=True)
        with asked.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(made)) + "\n")
    write(rows, asked.rows)
    rows = read(asked.rows)
    asked.to.write_text(markdown(rows), encoding="utf-8")
    if asked.to == DOCUMENT:
        README.write_text(with_line(README.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return int(any(made.outcome in (WRONG, CRASHED, LATE) for made in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
