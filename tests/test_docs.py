"""What the pages say is there: files, headings, modules, settings and commands."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.__main__ import compose_config
from pipeline.config.overrides import split

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted(DOCS.glob("*.md"))]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[str]:
    """Targets of links and images that are no addresses."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings: lower case, no punctuation, spaces as hyphens, -1 for the second."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        again = sum(1 for each in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", each))
        found.append(f"{slug}-{again}" if again else slug)
    return set(found)


@PAGE
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}: no such file"
        assert file.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}: no such heading"


def test_anchors_are_made_as_github_makes_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b_c`, d: 1.5?\n```sh\n# no heading\n```\n## Two\n## Two\n### `python -m x.y`\n")
    assert anchors(page) == {"a-b_c-d-15", "two", "two-1", "python--m-xy"}


def test_every_page_is_reached_from_the_index() -> None:
    waiting, seen = [DOCS / "index.md"], set()
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        waiting += [(page.parent / target.partition("#")[0]).resolve() for target in links(page) if target[0] != "#"]
    assert set(DOCS.glob("*.md")) <= seen and "docs/index.md" in set(links(ROOT / "README.md"))


NAMED = re.compile(r"`((?:passes|pipeline|conf|tests|benchmarks|examples|docs)/[\w./*-]*|\.ci/run)`")


@PAGE
def test_every_file_of_ours_that_a_page_names_exists(page: Path) -> None:
    """In backticks; ``NAME`` stands for one to be made, whose folder has to exist."""
    for name in NAMED.findall(prose(page)):
        existing = name.partition("NAME")[0]
        assert list(ROOT.glob(existing.rstrip("/"))), f"{page.name}: {name}: no such file"


def source_of(module: str) -> Path | None:
    base = ROOT / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Names that stand at the top of a module or class, and the statements that make them."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id: node for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.If):
            names |= defined(node.body)
    return names


def missing(name: str) -> str | None:
    """The part of a dotted name of ours that is not there, read from the sources: an import would take seconds."""
    parts = name.split(".")
    known = [n for n in range(len(parts), 0, -1) if source_of(".".join(parts[:n]))]
    if not known:
        return parts[0]
    source = source_of(".".join(parts[: known[0]]))
    assert source is not None
    body = ast.parse(source.read_text(encoding="utf-8")).body
    for part in parts[known[0] :]:
        node = defined(body).get(part)
        if node is None:
            return part
        body = node.body if isinstance(node, ast.ClassDef) else []
    return None


@PAGE
def test_every_module_and_name_of_ours_that_a_page_runs_or_imports_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"python -m ((?:pipeline|passes|benchmarks)[\w.]*\w)", text)
    names += re.findall(r"`((?:pipeline|passes)(?:\.\w+)+)[`(]", text)
    for language, block in FENCE.findall(text):
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    names += [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "passes":
                    names.append(f"passes.{node.attr}")
    for name in names:
        if name.split(".")[0] in ("pipeline", "passes", "benchmarks"):
            assert missing(name) is None, f"{page.name}: {name}"


def test_names_that_are_not_there_are_missed() -> None:
    assert missing("pipeline.generate.with_cache.CachedGenerator.generate") is None
    assert missing("pipeline.generate.with_cache.CachedGenerator.nothing") == "nothing"
    assert missing("pipeline.generate.nothing") == "nothing" and missing("nothing.at.all") == "nothing"


def pipeline_commands() -> Iterator[list[str]]:
    """The settings of every ``python -m pipeline`` in a block of code, one list for each."""
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.splitlines() if language == "sh" else ():
                if found := re.search(r"python -m pipeline(?: |$)(.*)", line):
                    words = shlex.split(found[1], comments=True)
                    if "--help" not in words:
                        yield words


@pytest.mark.parametrize("words", list(pipeline_commands()), ids=" ".join)
def test_every_command_of_the_pages_is_taken(words: list[str], tmp_path: Path) -> None:
    """Composed and checked as the command does; of a sweep, with the first of several values."""
    (tmp_path / "config.json").write_text("{}")
    first = [word if word == "-m" else _first(word) for word in words]
    folder = [f"model.path={tmp_path}" if word == "model.path=DIR" else word for word in first if word != "-m"]
    config = compose_config(folder)
    assert config.output == "outputs"


def _first(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={split(value)[0]}"


def test_the_table_of_settings_has_every_choice_of_every_group() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| .* \|$", (DOCS / "settings.md").read_text(), re.MULTILINE))
    groups = [path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name not in ("hydra", "row")]
    assert len(groups) == 8
    for group in groups:
        assert {f"`{path.stem}`" for path in group.glob("*.yaml")} <= set(re.findall(r"`\w+`", rows[group.name]))


def test_the_readme_is_read_in_three_minutes_and_shows_a_picture() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180 and len(" ".join(lines).split()) <= 1000
    assert any(re.fullmatch(r"!\[.+\]\(docs/pictures/speed-up\.svg\)", line) for line in lines)
    assert not any(line.startswith("| ---") for line in lines), "tables of results are in docs/results.md"


ADDED = ("a model", "a mask form", "a strategy", "a precision")


def test_what_one_adds_is_a_list_of_at_most_three_files_each() -> None:
    """``tests/test_docs.py`` looks for the files themselves above."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (a [^|]*?) \| (.*) \|$", text, re.MULTILINE))
    assert all(NAMED.findall(rows[what]) for what in ADDED)
    for what, files in rows.items():
        assert len(NAMED.findall(files)) <= 3, what
