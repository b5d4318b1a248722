"""What a person types: taken as the shell hands it over, or refused in the same words; and shown again as it is."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_LLAMA
from omegaconf import OmegaConf
from reports import failed, keep, real
from rich.console import Console

from passes.errors import UserError
from pipeline.__main__ import _main, compose_config
from pipeline.compare.__main__ import main as compare
from pipeline.config.axes import axes, has, parse
from pipeline.config.idle import idle, refuse_idle, why_idle
from pipeline.config.lengths import positions, settle
from pipeline.config.overrides import for_hydra, quoted, read, split, typed, unquoted
from pipeline.config.schema import Config
from pipeline.engine.sections import Engine
from pipeline.host.plain_json import to_json
from pipeline.record.console import StageDisplay
from pipeline.record.markdown import cell
from pipeline.record.sections import Failure, new_report
from pipeline.sweep.display import line
from pipeline.sweep.jobs import plan
from pipeline.sweep.keys import settings_key
from pipeline.sweep.registry import best
from pipeline.sweep.table import check_baseline
from pipeline.tracking.names import folder_name

ODD = [
    "/models/llama (old)", "/m/a,b", "/m/a, b", "/m/a=b", "/m/it's", '/m/"quoted" here', "'", '"', "/m/a'b\"c", "/m/$x",
    "/m/back\\slash", "/m/ends\\", "/m/\\'", "/m/größe 模型", "/m/[bold]", "/m/{a}", "/m/(", "]", "/m/a:b", "/m/#x",
    "123", "01", "1e3", "true", "None", "~/m/llama", "-x", "/m/%s", "/m/a;b", "/m/@", "choice(a,b)", " ", "a  b ", "!x",
]  # fmt: skip
"""What names a folder on somebody's disk."""


def value_of(override: str) -> Any:
    (parsed,) = read([override])
    return parsed.value()


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A folder that says of itself that it has 256 positions."""
    folder = tmp_path / "it's a (tiny), model=1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return folder


# Free text: paths above all


@pytest.mark.parametrize("text", ODD)
def test_free_text_is_taken_to_the_letter_and_named_to_the_letter(text: str) -> None:
    override = for_hydra(f"model.path={text}", several=False)

    assert value_of(override) == text
    assert typed(override) == f"model.path={text}"
    assert unquoted(quoted(text)) == text


def test_any_string_of_the_letters_that_mean_something_to_a_grammar_survives() -> None:
    rng = random.Random(0)
    for _ in range(150):
        text = "".join(rng.choices("a/ ,='\"\\()[]{}$~:%#*?!|", k=rng.randint(1, 9)))
        if (text[0], text[-1]) not in (("'", "'"), ('"', '"')):  # else the person quoted it
            assert value_of(for_hydra(f"output={text}", several=False)) == text


def test_what_a_person_quoted_for_hydra_is_not_quoted_again_and_null_stays_null() -> None:
    assert value_of(for_hydra("model.path='/m/a b'", several=False)) == "/m/a b"
    assert value_of(for_hydra("store.folder=null", several=False)) is None
    assert value_of(for_hydra("output=", several=False)) == ""


@pytest.mark.parametrize(
    ("given", "jobs"),
    [
        ("/m/a,/m/b", ["/m/a", "/m/b"]),
        ("/m/a (1), /m/b=2", ["/m/a (1)", "/m/b=2"]),
        ("'/m/a, b',/m/c", ["/m/a, b", "/m/c"]),
        ("/m/(a,b),/m/c", ["/m/(a,b)", "/m/c"]),
        ("/m/a(,/m/b", ["/m/a(", "/m/b"]),
        ("/m/it's,/m/b", ["/m/it's", "/m/b"]),
    ],
)
def test_with_m_the_commas_of_free_text_separate_values(given: str, jobs: list[str]) -> None:
    (override,) = read([for_hydra(f"model.path={given}", several=True)])

    assert override.is_sweep_override()
    assert [typed(f"model.path={each}") for each in override.sweep_string_iterator()] == [
        f"model.path={j}" for j in jobs
    ]


def test_a_baseline_has_commas_of_its_own_in_a_sweep_too() -> None:
    assert value_of(for_hydra("sweep.baseline=backend:eager,cache:none", several=True)) == "backend:eager,cache:none"


def test_settings_that_are_no_free_text_are_left_to_hydra() -> None:
    assert for_hydra("shape.max=64,128", several=False) == "++shape.max=64,128"
    assert for_hydra("strategy=lowering", several=True) == "strategy=lowering"
    assert for_hydra("+model.architecture.x=1", several=False) == "+model.architecture.x=1"


def test_lists_are_split_where_they_are_no_lists_within() -> None:
    assert split("a:[b,c], d:{e: 1, f: 2},g:'h,i'") == ["a:[b,c]", "d:{e: 1, f: 2}", "g:'h", "i'"]
    assert split("'h,i',j") == ["'h,i'", "j"]


def test_a_home_folder_is_the_users_and_a_path_with_everything_in_it_composes(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = [
        f"model.path=~/{small_model.name}", "model=local", "output=~/a, b", "tracking.uri=sqlite:///~/db file.db",
        "store.folder=~",
    ]  # fmt: skip
    config = compose_config([for_hydra(each, several=False) for each in given])

    assert config.model.path == str(small_model) and config.output == f"{tmp_path}/a, b"
    assert (config.tracking.uri, config.store.folder) == (f"sqlite:///{tmp_path}/db file.db", str(tmp_path))


# Refused in the words that were typed


@pytest.mark.parametrize("text", ["benchmark.generate={batch:1,", "model.inputs=[input_ids", "=3", "strategy"])
def test_what_cannot_be_read_is_shown_as_typed_with_how_to_write_it(text: str) -> None:
    with pytest.raises(UserError, match=r"cannot be read; .*'key=\[a, b\]', 'key=\{a: 1\}'") as caught:
        read([for_hydra(text, several=False)])
    assert str(caught.value).startswith(f"{text}: ")


REFUSED: list[tuple[list[str], str]] = [
    (["shape.min=64", "shape.max=32"], r"^shape.min=64 shape.max=32: the shortest length is above the longest$"),
    (["shape.min=64", "shape.max=32", "benchmark=generate"], r"^shape.min=64 shape.max=32: the shortest"),
    (["shape.max=-1"], r"^shape.max=-1: must be at least 1"),
    (["benchmark.generate=1"], r"^benchmark.generate=1: must be a mapping, \{batch: …, input_length: …"),
    (["benchmark.generate={lenght: 3}"], r"^benchmark.generate.lenght=3: no such setting; allowed here: batch"),
    (["benchmark=generate", "benchmark.generate.input_length=4000"], r"^benchmark.generate.input_length=4000: outside"),
    (["cache=static", "cache.capacity=64", "shape.max=128"], r"^cache.capacity=64: holds no prompt of shape.max=128"),
    (["model.path=/a (b), c=d"], r"^model.path=/a \(b\), c=d: no such folder"),
    (["strategy=lowering", "backend=eager"], r"^strategy=lowering: has no part in this run, since backend=eager"),
    (["strategy.unproven=error", "backend=eager"], r"^strategy.unproven=error: has no part in this run"),
    (["cache=static", "backend=eager"], r"^cache=static: has no part in this run.*benchmark=generate"),
    (["sweep.baseline=strategy:upstream"], r"^sweep.baseline=strategy:upstream: .*add -m"),
    (["-m"], r"^-m: a sweep over nothing"),
    (["-m", "strategy=lowering,upstream", "backend=eager"], r"^strategy=lowering,upstream: has no part in any"),
    (["strategy=lowering,upstream", "-m", "sweep.baseline=strategy:nonsense", "dry_run=true"],
     r"^sweep.baseline=strategy:nonsense: no job has it; strategy here is lowering, upstream$"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_a_mistake_is_one_line_that_names_what_was_typed(
    arguments: list[str], said: str, cwd: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        _main(arguments)

    assert "\n" not in str(caught.value) and "++" not in str(caught.value)
    assert list(cwd.iterdir()) == [] and capfd.readouterr() == ("", "")


# Settings without a part


@pytest.fixture(scope="module")
def default() -> Config:
    return compose_config([])


def eager(config: Config, **strategy: Any) -> Config:
    backend = replace(config.backend, name="eager", cudnn_attention=False)
    return replace(config, backend=backend, strategy=replace(config.strategy, **strategy))


def test_what_has_no_part_depends_on_the_rest(default: Config) -> None:
    quality = {"verify.text", "verify.max_perplexity_increase"}
    assert set(idle(default)) == {"benchmark.min_generations", "quantize", *quality}
    judged = replace(default, verify=replace(default.verify, quality=True))
    assert not quality & set(idle(judged)) and not quality & set(idle(replace(default, precision="int8_weights")))
    assert {"strategy", "shape.exact"} <= set(idle(eager(default)))
    assert why_idle(eager(default), "strategy.unproven") and why_idle(eager(default), "shape.max") is None
    assert why_idle(replace(default, model=replace(default.model, weights="random")), "model.revision")
    refuse_idle({"strategy": "strategy=lowering"}, [default, eager(default)], sweep=True)  # one of them has it


def test_jobs_that_differ_in_nothing_that_has_a_part_are_one(
    default: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(strategy: str, backend: str) -> tuple[list[str], Config]:
        config = replace(default, strategy=replace(default.strategy, name=strategy))
        return [f"strategy={strategy}", f"backend={backend}"], eager(config) if backend == "eager" else config

    every = [job(strategy, backend) for strategy in ("lowering", "upstream") for backend in ("tensorrt", "eager")]
    labels = [each.label for each in plan(every)]

    assert labels == ["strategy=lowering backend=tensorrt", "backend=eager", "strategy=upstream backend=tensorrt"]
    assert capsys.readouterr().err.startswith("! backend=eager: 1 more of the combinations are this job")
    assert settings_key(eager(default, name="upstream")) == settings_key(eager(default))
    assert settings_key(replace(default, strategy=replace(default.strategy, name="upstream"))) != settings_key(default)
    with pytest.raises(UserError, match="two jobs with the same settings"):
        plan([job("lowering", "eager"), job("lowering", "eager")])


# Lengths that nobody gave


def settings(limit: int | None = None, **groups: Any) -> Any:
    """Defaults of conf/, as far as lengths go."""
    plain = {
        "model": {"path": None, "architecture": {} if limit is None else {"max_position_embeddings": limit}},
        "shape": {"batch": 1, "min": 2, "opt": "${shape.max}", "max": "2048 or less", "exact": ["${shape.opt}"]},
        "cache": {"name": "none", "capacity": None},
        "benchmark": {"shapes": [{"batch": 1, "input_length": "${shape.max}"}], "generate": None},
    }
    return OmegaConf.merge(OmegaConf.create(plain), OmegaConf.create(groups))


GENERATE = {"generate": {"input_length": "1920 or less", "output_length": "128 or less"}}
CACHE = {"name": "in_engine", "capacity": None}


@pytest.mark.parametrize(
    ("given", "found", "because"),
    [
        (settings(), (2048, None), None),
        (settings(8192, benchmark=GENERATE), (2048, (1920, 128)), None),
        (settings(256), (256, None), "the model's max_position_embeddings=256"),
        (settings(256, benchmark=GENERATE), (256, (240, 16)), "the model's max_position_embeddings=256"),
        (settings(256, benchmark=GENERATE, cache=CACHE), (256, (240, 16)), "the model's max_position_embeddings=256"),
        (settings(8192, benchmark=GENERATE, shape={"max": 64}), (64, (61, 4)), "shape.max=64"),
        (settings(8192, benchmark=GENERATE, shape={"max": 64}, cache=CACHE), (64, (64, 128)), "shape.max=64"),
        (settings(8192, benchmark=GENERATE, cache=CACHE | {"capacity": 512}), (512, (480, 32)), "cache.capacity=512"),
        (settings(256, benchmark={"generate": {"input_length": 200}}), (256, (200, 56)), "the model's"),
        (settings(256, benchmark={"generate": {"output_length": 100}}), (256, (156, 100)), "the model's"),
        (settings(8192, shape={"max": 4096}), (4096, None), None),
        (settings(256, shape={"max": 4096}), (4096, None), None),  # typed: left as it is, and refused later
    ],
)
def test_lengths_that_nobody_gave_follow_and_are_said(given: Any, found: Any, because: str | None) -> None:
    said = settle(given)
    generate = given.benchmark.generate

    assert (given.shape.max, generate and (generate.input_length, generate.output_length)) == found
    assert (given.shape.opt, given.shape.exact[0], given.benchmark.shapes[0].input_length) == (found[0],) * 3
    assert len(said) == (because is not None) and (because is None or "not given, so " in said[0])
    assert because is None or because in said[0].split("follow")[1]


@pytest.mark.parametrize(
    "described", [{"max_position_embeddings": 256}, {"n_positions": 256}, {"text_config": {"n_positions": 256}}]
)
def test_positions_are_read_from_the_models_folder(described: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert positions(str(tmp_path), {}) == 256 == positions(None, described)

    (tmp_path / "config.json").write_text("{no json")
    assert positions(str(tmp_path), {}) is None and positions(None, {}) is None


def test_a_local_model_of_256_positions_needs_no_length_and_a_typed_one_is_never_changed(small_model: Path) -> None:
    local = ["model=local", for_hydra(f"model.path={small_model}", several=False), "benchmark=generate"]
    config = compose_config(local)

    assert (config.shape.max, config.shape.opt, config.shape.exact) == (256, 256, [256])
    assert config.benchmark.generate and config.benchmark.shapes[0].input_length == 240
    assert config.notes == (
        "shape.max=256, benchmark.generate.output_length=16, benchmark.generate.input_length=240: not given, so they "
        "follow the model's max_position_embeddings=256",
    )
    assert "notes" not in config.to_dict()
    with pytest.raises(UserError, match=r"^shape.max=257: above the model's max_position_embeddings=256$"):
        compose_config([*local, "shape.max=257"])
    with pytest.raises(UserError, match=r"^benchmark.generate.input_length=200 output_length=100: .* 300 tokens"):
        compose_config([*local, "benchmark.generate.input_length=200", "benchmark.generate.output_length=100"])


# A baseline


ROWS = [
    axes({"precision": "fp16", "strategy": {"name": name}, "backend": {"name": backend, "fused_rows": fused,
          "workspace_gib": 4.0}, "model": {"name": "m", "inputs": ["input_ids", "last"]}})
    for name, backend, fused in (("upstream", "tensorrt", False), ("lowering", "tensorrt", None), ("x", "eager", None))
]  # fmt: skip
UNSET = {"backend.fused_rows", "strategy.name"}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("strategy:upstream", [0]),
        ("backend.fused_rows:False", [0]),
        ("backend.fused_rows:false", [0]),
        ("backend.fused_rows:null", [1, 2]),
        ("backend:tensorrt, backend.fused_rows:NULL", [1]),
        ("backend.workspace_gib:4", [0, 1, 2]),
        ("backend.workspace_gib:4.00", [0, 1, 2]),
        ("model.inputs:[input_ids, last],strategy:lowering", [1]),
        ('strategy:"upstream"', [0]),
        ("backend:eager", [2]),
    ],
)
def test_a_baseline_is_read_as_settings_are(text: str, rows: list[int]) -> None:
    wanted = parse(text, "--baseline ", "axis", ROWS, UNSET, "report")
    assert [place for place, row in enumerate(ROWS) if has(row, wanted)] == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("backend.fused_rows:0", "no report has it; backend.fused_rows here is false"),
        ("backend.fused_rows:'False'", "no report has it"),
        ("strategy:x", "strategy here is lowering, upstream"),  # a rival has no strategy
        ("colour:red", "no axis colour; these reports have backend, "),
        ("strategy:", "is written AXIS:VALUE"),
        ("strategy:upstream,backend:eager", "no report has all of it together"),
    ],
)
def test_a_baseline_that_no_row_has_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        parse(text, "--baseline ", "axis", ROWS, UNSET, "report")
    assert str(caught.value).startswith(f"--baseline {text}: ")


def test_a_sweep_and_the_comparison_read_the_same_baseline(
    default: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = real("llama3_1b-lowering")
    report["config"]["backend"]["fused_rows"] = False
    keep(tmp_path / "runs" / "off", report)
    keep(tmp_path / "runs" / "on", real("llama3_1b-lowering"))
    fused = replace(default, backend=replace(default.backend, fused_rows=False))
    for text in ("backend.fused_rows:False", "backend.fused_rows:false,strategy:detect_causal"):
        check_baseline(text, [config.to_dict() for config in (default, fused)])
    code = compare([str(tmp_path / "runs"), "--baseline", "backend.fused_rows:False", "-o", str(tmp_path)])
    assert code == 0 and "times as fast" in (tmp_path / "comparison.md").read_text()


# Text is shown as it is, wherever it came from


NASTY = "benchmark.generate={batch: 1} [bold]x[/] %s {0} :smile: a|b *c* <b>&amp; `d` \\"


def test_a_sweeps_line_shows_a_label_with_braces() -> None:
    report = failed(real("llama3_1b-lowering"), "build", "crash", "at {place}")
    shown = line(NASTY, report, Path("/out/{run}"), 1.0, False)
    assert shown == f"✗ {NASTY}  1.0 s  build: crash: at {{place}}  /out/{{run}}"
    assert NASTY in line(NASTY, real("llama3_1b-lowering"), Path("out"), 1.0, False)


def failing(message: str) -> dict[str, Any]:
    """The report of a run that failed with ``message`` once its network was known."""
    engine = Engine(9, 1, 1, 0, 1, 0, notes=(message,))
    made = replace(new_report(compose_config([])), failure=Failure("build", "crash", message), engine=engine)
    return to_json(made)


@pytest.mark.parametrize(
    "show",
    [
        lambda display: display.note(NASTY),
        lambda display: display.failed("build", 1.0, NASTY),
        lambda display: display.done("build", 1.0, NASTY),
        lambda display: display.summary(failing(NASTY), Path(NASTY.replace("/", "")), NASTY),
    ],
    ids=["note", "failed", "done", "summary"],
)
def test_the_console_takes_no_text_for_markup(show: Callable[[StageDisplay], None]) -> None:
    shown = io.StringIO()
    show(StageDisplay(Console(file=shown, width=400)))
    assert NASTY in shown.getvalue()


def test_a_plan_and_its_table_show_a_label_as_it_is(
    default: Config, cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.sweep import estimate

    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(estimate, "device_bytes", lambda config, known: None)  # builds the model without its weights
    (job,) = plan([([], default)])
    estimate.show([replace(job, label=NASTY, config=replace(default, notes=("said [once]",)))])
    shown = capsys.readouterr().out
    assert NASTY in shown and "! said [once]" in shown


def test_one_cell_stays_one_cell() -> None:
    assert cell("a|b\nc") == r"a\|b c" and cell("<b>") == "&lt;b&gt;" and cell("[x]*`") == r"\[x\]\*\`"


@pytest.mark.parametrize("model", ["plain", 'it\'s (a) [b] {c,d} <e> $HOME `f` "g" h;i&j|k*l?m!n#o~p=q\\r%s\tü', NASTY])
def test_the_folder_of_a_run_needs_no_quoting_in_a_shell(default: Config, model: str) -> None:
    named = folder_name(
        replace(
            default,
            model=replace(default.model, name=model, weights="random"),
            strategy=replace(default.strategy, assume=("no_padding", "contiguous_positions")),
        )
    )
    assert "-assume-no_padding-assume-contiguous_positions-" in named
    for shell in filter(shutil.which, ("sh", "bash", "zsh")):
        said = subprocess.run([shell, "-c", f"printf %s 12-30-00_{named}"], capture_output=True, text=True, check=True)
        assert said.stdout == f"12-30-00_{named}"


def test_names_of_a_models_folder_become_names_that_paths_and_the_registry_take(default: Config) -> None:
    named = folder_name(replace(default, model=replace(default.model, name="../a/b\n" + "ü" * 300)))
    assert "/" not in named and "\n" not in named and len(named.encode()) <= 200
    assert folder_name(default) == "detect_causal-smollm2_135m-fp16-dynamic-2..2048"

    from pipeline.sweep.jobs import Row

    report = real("llama3_1b-lowering")
    report["model"]["name"] = "o'hara/v:1"
    found = best({"job": Row("job", "job", "", False, 1.0, "run")}, {"job": report})
    assert {model: {alias: won.run_id for alias, won in aliases.items()} for model, aliases in found.items()} == {
        "o_hara_v_1": {"fastest": "run", "smallest": "run"}
    }


def test_a_comparison_page_escapes_every_name(tmp_path: Path) -> None:
    report = real("llama3_1b-lowering")
    report["config"]["model"]["name"] = NASTY
    keep(tmp_path / "run", report)

    assert compare([str(tmp_path / "run"), "-o", str(tmp_path)]) == 0
    page, table = ((tmp_path / name).read_text() for name in ("comparison.html", "comparison.md"))
    assert "<b>&amp;" not in page and "&lt;b&gt;&amp;amp;" in page
    assert cell(NASTY) in table
