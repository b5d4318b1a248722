"""``python -m pipeline.compare``: reports in, one HTML page and one Markdown file out.

Exit code 1: ``--fail-if-slower`` found a row that is slower.  2: something asked for cannot be done; one line says
what, and nothing was written.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from passes.errors import UserError
from pipeline.host.arguments import Parser
from pipeline.host.files import write_text

if TYPE_CHECKING:
    from pipeline.compare.baseline import Against
    from pipeline.compare.page import Shown
    from pipeline.compare.remarks import Remarks
    from pipeline.compare.rows import Row

DEFAULT_URI = "sqlite:///mlflow.db"


def _parser() -> Parser:
    about = "Reports of runs in, one HTML page and one Markdown file out: which row won, by how much over what."
    parser = Parser("python -m pipeline.compare", description=about)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="a report.json, a folder of them, or an MLflow "
                        "experiment; default: the folder outputs")  # fmt: skip
    parser.add_argument("--uri", default=DEFAULT_URI, help="the MLflow store that has the experiments "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--mlflow-ui", metavar="URL", help="where `mlflow ui` shows a store that has no server "
                        "(default, for runs of an experiment: http://localhost:5000)")  # fmt: skip
    parser.add_argument("--baseline", metavar="AXIS:VALUE", help="show how many times as fast as these rows the others "
                        "are: strategy:upstream, or backend:eager,cache:none (default: as the fastest rival, and as "
                        "strategy:upstream)")  # fmt: skip
    parser.add_argument("--against", metavar="SOURCE", action="append", default=[], help="earlier reports to compare "
                        "each row with")  # fmt: skip
    parser.add_argument("--fail-if-slower", metavar="PERCENT", help="exit code 1 if a row is slower than the one of "
                        "--against (else of --baseline) by more than this, interval and all: 5%%")  # fmt: skip
    parser.add_argument("-o", "--output", default=".", help="a folder, or the HTML file; the Markdown file goes beside "
                        "it (default: comparison.html and comparison.md here)")  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(arguments: list[str]) -> int:
    asked = _parser().parse_args(arguments)
    limit = _limit(asked.fail_if_slower)
    if limit is not None and not asked.against and not asked.baseline:
        raise UserError(f"--fail-if-slower {asked.fail_if_slower}: than what? add --against SOURCE or --baseline")
    html_path = _html_path(asked.output)
    if not asked.sources and not Path("outputs").is_dir():
        raise UserError("no SOURCE given, and there is no folder outputs; name a folder of reports or an experiment")

    from pipeline.compare import page
    from pipeline.compare.baseline import against_earlier
    from pipeline.compare.labels import sections
    from pipeline.compare.remarks import Remarks
    from pipeline.compare.rows import row
    from pipeline.compare.sources import read

    ui = asked.mlflow_ui
    if ui is not None and not re.match(r"https?://", ui):
        raise UserError(f"--mlflow-ui {ui}: is no address; write http://HOST:PORT")
    rows, unreadable = read(asked.sources or ["outputs"], asked.uri, row, ui)
    sections(rows)  # for the labels of repetitions, each of which may be a regression
    remarks = Remarks()
    shown, compared = _shown(rows, asked.baseline, remarks)
    regressions = None
    if asked.against:
        earlier, also = read(asked.against, asked.uri, row, ui)
        unreadable += also
        sections(earlier)  # for their labels
        regressions = against_earlier(rows, earlier)
    _write(html_path, *page.render(shown, remarks, asked.baseline, regressions, limit, unreadable))

    for why in unreadable:
        print(f"unreadable: {why}", file=sys.stderr)
    for one in shown:
        for text in one.verdicts:
            print(f"{one.section.title}: {text}")
    print(f"{html_path} and {html_path.with_suffix('.md').name}: {len(rows)} runs, "
          f"{sum(bool(each.timings) for each in rows)} timed")  # fmt: skip
    if limit is None:
        return 0
    checked = regressions if regressions is not None else compared
    slower = [each for each in checked if each.slower(limit)]
    for each in slower:
        print(f"slower: {each.row.model}, {each.row.label}, {each.measure}: {each.time or each.why}", file=sys.stderr)
    return 1 if slower else 0


def write_page(folders: Sequence[Path], html_path: Path, baseline: str | None) -> None:
    """The page and the table of the runs in ``folders``, as the command writes them; raises :class:`UserError`."""
    from pipeline.compare import page
    from pipeline.compare.remarks import Remarks
    from pipeline.compare.rows import row
    from pipeline.compare.sources import read

    rows, unreadable = read([str(folder) for folder in folders], "", row)
    remarks = Remarks()
    shown, _ = _shown(rows, baseline, remarks)
    _write(html_path, *page.render(shown, remarks, baseline, unreadable=unreadable))


def _shown(rows: list[Row], asked_baseline: str | None, remarks: Remarks) -> tuple[list[Shown], list[Against]]:
    """Every section of the page, repetitions pooled, and each row of it that has a baseline of the same work to be
    compared with."""
    from pipeline.compare import page
    from pipeline.compare.baseline import against_baseline, parse_baseline
    from pipeline.compare.labels import sections
    from pipeline.compare.pool import pooled

    baseline = parse_baseline(asked_baseline, rows) if asked_baseline else None
    groups = sections(pooled(rows))
    compared = [against_baseline(section, baseline) if baseline else [] for section in groups]
    shown = [
        page.show(section, found, baseline, f"{i}-{_slug(section.title)}", remarks)
        for i, (section, found) in enumerate(zip(groups, compared, strict=True), 1)
    ]
    return shown, [each for found in compared for each in found if each.same_work]


def _slug(title: str) -> str:
    """For an address: letters, digits and hyphens."""
    return re.sub(r"[\W_]+", "-", title.lower()).strip("-")


def _limit(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if not found or not math.isfinite(float(found[1])):
        raise UserError(f"--fail-if-slower {text}: is no percentage; write it as 5%")
    return float(found[1]) / 100


def _html_path(output: str) -> Path:
    path = Path(output)
    if path.suffix == ".html" and not path.is_dir():
        return path
    if path.suffix and not path.is_dir():
        raise UserError(f"--output {output}: name a folder, or a file that ends in .html")
    return path / "comparison.html"


def _write(html_path: Path, html: str, markdown: str) -> None:
    try:
        html_path.parent.mkdir(parents=True, exist_ok=True)
        write_text(html_path, html)
        write_text(html_path.with_suffix(".md"), markdown)
    except OSError as error:
        raise UserError(f"--output {html_path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(main())
