"""The table of families: every decoder that transformers can build from a tiny config, in every form that is run.

python -m benchmarks.family_table                     # what is missing in families.jsonl, then docs/architectures.md
python -m benchmarks.family_table --only llama,gpt2   # a part of it
python -m benchmarks.family_table --again gemma2      # these rows anew; also crashed, refused, ... for all of that outcome
python -m benchmarks.family_table --no-runs           # the document alone

Each row is a run of the pipeline in a process of its own, with a time limit; whatever ends the command, the same command
goes on with it.  All of it takes some hours of one core.  Exit code 1 where a family is wrong, crashed or timed out.
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

ROWS = Path(__file__).resolve().parent / "families.jsonl"
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
LIMIT_S = 300.0
"""Seconds that a run may take."""
ORDER = ("generation", "padded prompt", "prompt")
"""The form that tells most comes first."""
FAST = {"native_causal": "", "native_full": "", "native_causal_lower_right": "", "cached": ""}
"""Actions of an attention call that read no mask and no more keys than they must."""
WORDS = {"native_mask": "mask read", "decomposed": "written out", "untouched": "written out"}


def read(path: Path = ROWS) -> dict[tuple[str, str], Row]:
    """The rows that are kept, by family and form."""
    if not path.is_file():
        return {}
    rows = (Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line)
    return {(made.family, made.form): made for made in rows}


def write(rows: dict[tuple[str, str], Row], path: Path = ROWS) -> None:
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
    if not made.masks:
        found.append("attention written out by the model")
    return list(dict.fromkeys(found))


def cell(made: Row | None, reasons: dict[str, int]) -> str:
    if made is None:
        return "not run"
    if made.outcome == RIGHT:
        return "; ".join(slow(made)) or "fast"
    return f"{made.outcome} ({reasons.setdefault(made.reason, len(reasons) + 1)})"


def standing(rows: Iterable[Row]) -> str:
    """What a family is in one word: of its forms, the one that is worst off."""
    outcomes = [made.outcome if made.outcome != RIGHT or slow(made) else "fast" for made in rows]
    order = (CRASHED, WRONG, LATE, NONE, REFUSED, STOPPED, RIGHT, "fast")
    return min(outcomes, key=order.index)


def markdown(rows: dict[tuple[str, str], Row]) -> str:
    """The document."""
    families = list(dict.fromkeys(family for family, _ in rows))
    counts = {form: Counter(made.outcome for (_, each), made in rows.items() if each == form) for form in FORMS}
    stacks = sorted({made.versions for made in rows.values()})
    least, most = (option.split("=")[1] for option in (family_runs.LENGTHS[0], family_runs.LENGTHS[2]))
    reasons: dict[str, int] = {}
    table = [
        f"| {family} | {' | '.join(cell(rows.get((family, form)), reasons) for form in FORMS)} |\n"
        for family in families
    ]
    built = {family for (family, _), made in rows.items() if made.outcome != NONE}
    parts = [
        "# Families of decoders\n\n"
        "Which Hugging Face decoders run, which of them fast, and why others do not: tiny random models of every class "
        "that transformers has for causal language modelling, each through the pipeline as a folder of your own would "
        "be. An engine is built ahead of time (fp16), and the graph that it was made from is compared with PyTorch, at "
        f"lengths from {least} to {most} tokens, with windows and chunks of 16 and rotary factors that change at 24; "
        "a generation token by token.\n\n"
        f"Made by `python -m benchmarks.family_table` with {'; '.join(stacks)}.\n\n"
        f"{len(families)} families, {len(built)} of them built.\n"
        + "".join(f"- {form}: {', '.join(f'{n} {name}' for name, n in counts[form].items())}\n" for form in FORMS)
        + "\n`fast`: every attention call reads no mask and has a fused kernel. A cell that names calls is right, and says "
        "which of them do not: a mask that is read, attention written out, a layer without a fused kernel. *prompt* is "
        "the program that runs a prompt, *step* the one that runs each token after it. `refused`: before anything is "
        "built, `stopped`: later; a number says below what is said then.\n\n"
        f"What the masks of a graph are in every way that a model is called is in [masks by call](masks-by-call.md).\n\n"
        f"| family | {' | '.join(FORMS)} |\n|{'---|' * (len(FORMS) + 1)}\n",
        *table,
        "\n## Why not\n\n",
        *(f"{number}. `{reason.replace('`', chr(39))}`\n" for reason, number in reasons.items()),
    ]
    return "".join(parts)


def wanted(asked: argparse.Namespace, rows: dict[tuple[str, str], Row]) -> Iterator[tuple[str, str]]:
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
    asked.to.write_text(markdown(read(asked.rows)), encoding="utf-8")
    return int(any(made.outcome in (WRONG, CRASHED, LATE) for made in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
