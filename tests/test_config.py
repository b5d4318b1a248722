"""Settings: what composes, what is refused and how, and how fast the command line answers."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import environment
from conftest import CONF

from passes.errors import UserError
from pipeline.__main__ import _main, compose_config
from pipeline.config.choices import STAGES
from pipeline.config.keys import schema_keys
from pipeline.config.overrides import for_hydra, model_by_name

ROOT = CONF.parent
LOCAL = f"model.path={Path(__file__).parent / 'data-that-is-not-there'}"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The real command line, from a folder that is not the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def refusal(*overrides: str) -> str:
    """The one line with which the settings are refused."""
    with pytest.raises(UserError) as caught:
        _main(list(overrides))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """As much of a model folder as the settings are checked against."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def empty_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# What composes


def test_the_default_job_is_the_one_that_the_readme_names() -> None:
    config = compose_config([])

    assert (config.model.name, config.strategy.name, config.precision) == ("smollm2_135m", "detect_causal", "fp16")
    assert (config.shape.kind, config.shape.min, config.shape.max) == ("dynamic", 2, 2048)
    assert config.reaches("benchmark")


@pytest.mark.parametrize("group", ["model", "strategy", "backend", "shape", "cache", "benchmark", "tracking"])
def test_every_choice_of_a_group_composes_with_the_defaults_of_the_others(group: str, model_dir: Path) -> None:
    needed = {
        "local": [f"model.path={model_dir}"],
        "hub": ["model.source=a/b", "+model.architecture.model_type=llama"],
        "dynamic": ["backend=eager"],
        "server": ["tracking.uri=http://127.0.0.1:5000"],
    }
    for choice in choices(group):
        config = compose_config([f"{group}={choice}", *needed.get(choice, [])])

        owner = getattr(config, group)
        assert choice.startswith(getattr(owner, "kind", None) or owner.name)


@pytest.mark.parametrize(
    "groups",
    [pytest.param(("strategy", "backend", "shape"), marks=pytest.mark.slow), ("model", "shape")],
    ids=" × ".join,
)
def test_every_pair_of_groups_that_know_of_each_other_composes(groups: tuple[str, ...]) -> None:
    """Of three groups each two choices meet in every second combination; one takes a third of a second."""
    places = itertools.product(*(enumerate(choices(group)) for group in groups))
    combinations = [
        tuple(choice for _, choice in each)
        for each in places
        if len(groups) < 3 or sum(place for place, _ in each) % 2 == 0
    ]
    assert len(combinations) >= 10
    for first, second in itertools.combinations(range(len(groups)), 2):
        met = {(each[first], each[second]) for each in combinations}
        assert met == set(itertools.product(choices(groups[first]), choices(groups[second])))
    for combination in combinations:
        if {"local", "hub"} & set(combination):
            continue
        config = compose_config([f"{group}={choice}" for group, choice in zip(groups, combination, strict=True)])

        chosen = [getattr(config, group) for group in groups]
        assert tuple(getattr(owner, "kind", None) or owner.name for owner in chosen) == combination


def test_every_experiment_of_the_checkout_composes(model_dir: Path) -> None:
    for name in choices("experiment"):
        compose_config([f"experiment={name}"])


def test_an_experiment_of_the_users_own_is_found_through_config_dir(
    empty_cwd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "long.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: llama3_1b\nshape: {max: 4096}\n"
    )

    code = _main(["--config-dir", str(tmp_path / "mine"), "experiment=long", "--cfg", "job"])

    printed = capsys.readouterr().out
    assert code == 0 and "name: llama3_1b" in printed and "max: 4096" in printed


def test_a_setting_of_the_schema_need_not_stand_in_the_yaml() -> None:
    assert "fp32" not in (CONF / "backend" / "eager.yaml").read_text()
    sparse = set(schema_keys("benchmark")) - {"name", "shapes"}

    assert sparse and "min_iterations" not in (CONF / "benchmark" / "none.yaml").read_text()
    assert _composed_through_the_command_line("benchmark=none", "benchmark.min_iterations=77") == 77


def _composed_through_the_command_line(*overrides: str) -> int:
    return compose_config([for_hydra(override, several=False) for override in overrides]).benchmark.min_iterations


@pytest.mark.parametrize("stage", STAGES)
def test_until_reaches_its_stage_and_no_further(stage: str) -> None:
    config = compose_config([f"until={stage}"])

    reached = [name for name in STAGES if config.reaches(name)]
    assert reached == list(STAGES[: STAGES.index(stage) + 1])


def test_the_length_that_is_tuned_for_has_a_profile_of_its_own_where_lengths_vary() -> None:
    assert compose_config([]).shape.exact == [2048]
    assert compose_config(["shape.opt=512"]).shape.exact == [512]
    assert compose_config(["shape.exact=[]"]).shape.exact == []
    assert compose_config(["shape=static"]).shape.exact == []


def test_a_report_can_hold_every_config() -> None:
    assert json.loads(json.dumps(compose_config([]).to_dict()))["shape"]["opt"] == 2048


def test_a_model_by_its_repository_or_path_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "it's, here").mkdir()
    (tmp_path / "smollm2_135m").mkdir()
    monkeypatch.chdir(tmp_path)
    path = f"{tmp_path}/it's, here"

    def written(argument: str, several: bool = False) -> list[str]:
        return model_by_name(argument, several, {"smollm2_135m", "mine/own"}.__contains__)

    for as_it_is in ("model=smollm2_135m", "model=mine/own", "model=a/b/c", "model.path=a/b", "strategy=a/b"):
        assert written(as_it_is) == [as_it_is]
    assert written("model=Qwen/Qwen3-0.6B") == ["model=hub", "model.source=Qwen/Qwen3-0.6B"]
    assert written("model=a/b,c/d", True) == ["model=hub", "model.source=a/b,c/d"]
    for there in (path, "it's, here", "./smollm2_135m", "gone.gguf"):
        assert written(f"model={there}") == ["model=local", f"model.path={there}"]
    with pytest.raises(UserError, match=r"^model=a/b,smollm2_135m: a sweep is over models of conf/, or "):
        written("model=a/b,smollm2_135m", True)


# What is refused: one line that names key, value, and what is allowed or what to do

REFUSED: list[tuple[list[str], list[str]]] = [
    (["strategy=foo"], ["strategy=foo", "decompose, detect_causal, lowering, mask_input, upstream"]),
    (["model=foo"], ["model=foo", "smollm2_135m"]),
    (["model=a/b/c"], ["model=a/b/c", "smollm2_135m"]),
    (["model=hub"], ["model.source=???", "model=ORG/NAME"]),
    (["backend=onnx"], ["backend=onnx", "eager, plugin, tensorrt, torch_compile"]),
    (["shape=ragged"], ["shape=ragged", "dynamic, static"]),
    (["cache=paged"], ["cache=paged", "none"]),
    (["precision=int3"], ["precision=int3", "fp16, bf16, fp32, int8_weights, int4_weights, fp8"]),
    (["precision=fp8", "quantize.base=fp32"], ["quantize.base=fp32", "fp16, bf16"]),
    (["precision=fp8", "backend=eager"], ["precision=fp8", "backend=eager", "precision=fp16"]),
    (["precision=int8_weights", "strategy=upstream"], ["precision=int8_weights", "strategy=upstream"]),
    (["precision=int4_weights", "quantize.block=100"], ["quantize.block=100", "128, 64, 32"]),
    (["precision=int4_weights", "quantize.method=best"], ["quantize.method=best", "round, gptq, awq"]),
    (["precision=int8_weights", "quantize.block=64"], ["quantize.block=64", "scale for each output channel"]),
    (["precision=int8_weights", "quantize.method=awq"], ["quantize.method=awq", "rounds to the nearest"]),
    (["precision=int8_weights", "quantize.prompt=fp16"], ["quantize.prompt=fp16", "cache=none has one engine"]),
    (["precision=int8_weights", "cache=in_engine", "quantize.step=fp8"], ["quantize.step=fp8", "int8_weights, fp16"]),
    (
        ["precision=int8_weights", "cache=in_engine", "quantize.prompt=fp16", "quantize.step=fp16"],
        ["quantize.prompt=fp16 quantize.step=fp16", "no engine has smaller weights"],
    ),
    (["precision=fp8", "quantize.calibration.samples=0"], ["quantize.calibration.samples=0", "at least 1"]),
    (["precision=fp8", "quantize.calibration.text=nowhere.txt"], ["quantize.calibration.text=nowhere.txt", "no such"]),
    (["quantize.base=bf16"], ["quantize.base=bf16", "precision=fp16 has no weights of fewer bits"]),
    (["until=lunch"], ["until=lunch", ", ".join(STAGES)]),
    (["experiment=foo"], ["experiment=foo"]),
    (["strategy=null"], ["strategy=null"]),
    (["+strategy=lowering"], ["strategy=lowering", "override"]),
    (["~strategy"], ["strategy=???", "set it"]),
    (["foo=1"], ["foo=1", "allowed here", "precision"]),
    (["+foo=1"], ["foo=1", "allowed here", "precision"]),
    (["model.foo=1"], ["model.foo=1", "allowed here", "weights"]),
    (["+model.foo=1"], ["model.foo=1", "allowed here", "weights"]),
    (["model.architecture.foo=1"], ["model.architecture.foo=1", "+model.architecture.foo=1"]),
    (["hydra.foo=1"], ["hydra.foo=1", "no such setting"]),
    (["model.weights=half"], ["model.weights=half", "pretrained, random"]),
    (["model.logits=first"], ["model.logits=first", "last, all"]),
    (["model.inputs=[input_ids,labels]"], ["model.inputs=labels", "input_ids, attention_mask, position_ids"]),
    (["model.inputs=[attention_mask]"], ["model.inputs=['attention_mask']", "input_ids"]),
    (["model.inputs=[input_ids,input_ids]"], ["model.inputs=", "once"]),
    (["model.inputs=input_ids"], ["model.inputs=input_ids", "a list"]),
    (["model=local"], ["model.path", "model.path=DIR"]),
    (["model=local", LOCAL], [LOCAL, "no such folder"]),
    (["model=local", f"model.path={CONF}"], [f"model.path={CONF}", "config.json"]),
    (["model.weights=random", "model.architecture=null"], ["model.architecture"]),
    (["strategy.unproven=force"], ["strategy.unproven=force", "strategy=lowering", "mask, decompose, error"]),
    (["strategy=mask_input", "strategy.unproven=mask"], ["strategy.unproven=mask", "strategy=mask_input"]),
    (["strategy=lowering", "strategy.unproven=mask"], ["strategy.unproven=mask", "keep, error, force"]),
    (["strategy=lowering", "strategy.unproven=null"], ["strategy.unproven=null", "keep, error, force"]),
    (["strategy.assume=[no_mask]"], ["strategy.assume=no_mask", "contiguous_positions, no_padding"]),
    (["strategy.assume=no_padding"], ["strategy.assume=no_padding", "a list"]),
    (["strategy.assume=[no_padding]"], ["strategy.assume=no_padding", "attention_mask", "model.inputs=[input_ids]"]),
    (
        ["strategy.assume=[contiguous_positions]", "model.inputs=[input_ids,attention_mask]"],
        ["strategy.assume=contiguous_positions", "position_ids", "model.inputs=[input_ids,attention_mask]"],
    ),
    (
        ["strategy=mask_input", "strategy.assume=[no_padding]"],
        ["strategy.assume=[no_padding]", "strategy=detect_causal and strategy=lowering"],
    ),
    (["strategy=upstream", "strategy.guard=true"], ["strategy.guard=True", "strategy=upstream", "strategy=lowering"]),
    (["strategy.guard=null"], ["strategy.guard=null", "true or false"]),
    (["strategy.guard=often"], ["strategy.guard=often", "true or false"]),
    (["strategy=decompose", "strategy.require_fused=true"], ["strategy.require_fused=True", "strategy=decompose"]),
    (["strategy=upstream", "strategy.require_fused=false"], ["strategy.require_fused=False", "strategy=upstream"]),
    (["backend=eager", "strategy.require_fused=true"], ["strategy.require_fused=true", "backend=eager"]),
    (["strategy.require_fused=perhaps"], ["strategy.require_fused=perhaps", "true or false"]),
    (["backend=eager", "backend.cuda_graph=true"], ["backend.cuda_graph=True", "backend=tensorrt", "backend=eager"]),
    (["backend=eager", "backend.optimization_level=3"], ["backend.optimization_level=3", "backend=tensorrt"]),
    (["backend.mode=default"], ["backend.mode=default", "torch_compile"]),
    (["backend.cudnn_attention=true"], ["backend.cudnn_attention=True", "backend=eager"]),
    (["backend.aux_streams=-1"], ["backend.aux_streams=-1", "0 or more"]),
    (["backend.optimization_level=6"], ["backend.optimization_level=6", "0, 1, 2, 3, 4, 5"]),
    (["backend.workspace_gib=0"], ["backend.workspace_gib=0", "above 0"]),
    (["backend.workspace_gib=much"], ["backend.workspace_gib=much", "a number or null"]),
    (["backend=torch_compile", "backend.mode=fast"], ["backend.mode=fast", "reduce-overhead"]),
    (["backend=eager", "until=build"], ["until=build", "backend=tensorrt"]),
    (["backend=eager", "until=export"], ["until=export", "backend=tensorrt"]),
    (["shape.max=16384"], ["shape.max=16384", "max_position_embeddings=8192"]),
    (["shape.max=many"], ["shape.max=many", "a whole number"]),
    (["shape.max=2.5"], ["shape.max=2.5", "a whole number"]),
    (["shape.max=null"], ["shape.max=None", "a whole number"]),
    (["shape.max=1"], ["shape.min=2", "shape.max=1"]),
    (["shape.min=0"], ["shape.min=0", "at least 1"]),
    (["shape.min=2048"], ["shape.min=2048", "shape=static"]),
    (["shape.opt=4096"], ["shape.opt=4096", "shape.max=2048"]),
    (["shape=static", "shape.min=5", "shape.opt=5"], ["shape.min=5", "static"]),
    (["shape.exact=[512,2049]"], ["shape.exact=2049", "shape.min=2..shape.max=2048"]),
    (["shape.exact=[1]"], ["shape.exact=1", "shape.min=2"]),
    (["shape.exact=[512,7,512]"], ["shape.exact=[512, 7, 512]", "name 512 once"]),
    (["shape.exact=[long]"], ["shape.exact[0]=long"]),
    (["shape.exact=512"], ["shape.exact=512", "a list"]),
    (["shape=static", "shape.exact=[2048]"], ["shape.exact=[2048]", "shape=dynamic"]),
    (["shape.batch=0"], ["shape.batch=0", "at least 1"]),
    (["benchmark=prefill_lengths", "shape.max=1024"], ["benchmark.shapes.input_length=2048", "shape.max=1024"]),
    (["benchmark.shapes=[{batch: 1, input_length: 4096}]"], ["benchmark.shapes.input_length=4096", "shape.max=2048"]),
    (["benchmark.shapes=[{batch: 2, input_length: 64}]"], ["benchmark.shapes.batch=2", "shape.batch=1"]),
    (["benchmark.shapes=[{length: 64}]"], ["benchmark.shapes.length", "batch, input_length"]),
    (["benchmark.shapes=[{batch: x}]"], ["benchmark.shapes.batch=x", "a whole number"]),
    (["benchmark.min_iterations=1"], ["benchmark.min_iterations=1", "at least 10"]),
    (["verify.lengths=[4096]"], ["verify.lengths=4096", "shape.max=2048"]),
    (["verify.lengths=[long]"], ["verify.lengths[0]=long"]),
    (["verify.samples=0"], ["verify.samples=0", "at least 1"]),
    (["seed=-1"], ["seed=-1", "at least 0"]),
    (["seed=${nowhere}"], ["seed=${nowhere}", "nowhere"]),
    (["output="], ["output=", "name a folder"]),
    (["tracking.uri="], ["tracking.uri=", "sqlite:///"]),
    (["tracking=server"], ["tracking.uri", "set it"]),
    (["tracking.log_engine=perhaps"], ["tracking.log_engine=perhaps", "true or false"]),
    (["strategy"], ["strategy", "key=value"]),
    (["strategy=lowering,upstream"], ["strategy=lowering,upstream", "-m"]),
    (["-m", "strategy=lowering,foo"], ["strategy=foo", "allowed are"]),
    (["-m", "precision=fp16,int3", "strategy=lowering,upstream"], ["precision=int3", "fp16, bf16, fp32"]),
    (["-m", "seed=interval(1,2)"], ["INTERVAL"]),
    (["-m", "precision=fp16,fp16"], ["-m: ", "fp16", "same settings"]),
    (["-m", "seed=1,01"], ["seed=1 and seed=01", "same settings"]),
    (["-m", "sweep.timeout_minutes=1,2"], ["sweep.timeout_minutes=2 changes sweep", "in common"]),
    (["-m", "output=a,b"], ["output=b changes output", "in common"]),
    (["-m", "foo=1,2"], ["foo=1", "no such setting"]),
    (["-m", "sweep.baseline=upstream"], ["sweep.baseline=upstream", "SETTING:VALUE"]),
    (["-m", "sweep.baseline=colour:red"], ["sweep.baseline=colour:red", "no setting"]),
    (["-m", "strategy=lowering,decompose", "sweep.baseline=strategy:upstream"], ["strategy here is decompose, low"]),
    (["-m", "seed=1,2", "hydra/launcher=rocket"], ["hydra/launcher=rocket", "submitit_local"]),
    (["-m", "seed=1,2", "tracking=server", "tracking.uri=http://127.0.0.1:9"], ["127.0.0.1:9", "no MLflow server"]),
    (["sweep.timeout_minutes=0"], ["sweep.timeout_minutes=0", "above 0"]),
    (["sweep.builders=0"], ["sweep.builders=0", "at least 1"]),
    (["-m", "sweep.builders=2", "hydra/launcher=submitit_local"], ["sweep.builders=2", "plugins"]),
    (["tracking.register=true"], ["tracking.register=true", "-m"]),
    (["--cfg", "job", "precision=int3"], ["precision=int3", "fp16, bf16, fp32"]),
    (["--cfg", "everything"], ["everything", "--help"]),
    (["--fast"], ["--fast", "--help"]),
    (["--config-dir", "nowhere"], ["--config-dir=nowhere", "no such folder"]),
    (["--config-path", "nowhere"], ["--config-path=nowhere", "--config-dir"]),
    (["--config-name", "nowhere"], ["nowhere"]),
    (["--experimental-rerun", "nowhere"], ["--experimental-rerun=nowhere"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "named"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_a_bad_setting_is_refused_in_one_line_and_nothing_is_created(
    overrides: list[str], named: list[str], empty_cwd: Path
) -> None:
    message = refusal(*overrides)

    for part in named:
        assert part in message
    assert list(empty_cwd.iterdir()) == []


# The command line itself


def test_help_lists_every_group_choice_and_setting(capsys: pytest.CaptureFixture[str], empty_cwd: Path) -> None:
    with pytest.raises(SystemExit) as left:
        _main(["--help"])
    shown = capsys.readouterr().out
    flat = shown.replace("\n    ", " ")  # a long list goes on in the next line

    assert left.value.code == 0
    for group in ("model", "strategy", "backend", "shape", "benchmark", "tracking", "row", "row/prefill"):
        assert f"{group}: {', '.join(choices(group))}" in flat
    for key in schema_keys():
        assert key in shown
        for setting in set(schema_keys(key)) - {"name", "kind"}:  # those are what GROUP=CHOICE sets
            assert setting in shown, f"{key}.{setting}"
    assert max(map(len, shown.splitlines())) <= 80
    assert list(empty_cwd.iterdir()) == []


def test_the_version_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["--version"]) == 0
    assert capsys.readouterr().out == f"proved-attention {version('proved-attention')}\n"


def test_the_help_asks_for_no_setting_that_does_not_exist() -> None:
    import re

    text = (CONF / "hydra" / "help" / "pipeline.yaml").read_text()
    groups = [key for key in schema_keys() if schema_keys(key)]
    written = re.findall(rf"\b({'|'.join(groups)})\.(\w+)", text)
    assert len(written) > 10
    for group, setting in written:
        assert setting in schema_keys(group)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["precision=int3"], 2), (["-m", "strategy=lowering,foo"], 2)]
)
def test_help_and_a_mistake_answer_within_three_seconds(arguments: list[str], code: int, tmp_path: Path) -> None:
    seconds: list[float] = []
    while len(seconds) < 2 and min(seconds, default=9) > 3:  # the first may have to read the files from disk
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = command(*arguments, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: it waits for nothing, and other tests run beside this one.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert done.returncode == code, done.stderr
    assert min(seconds) <= 3
    assert len((done.stderr if code else done.stdout).splitlines()) == 1 or code == 0
    assert done.stderr.startswith("error: ") or code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_found_without_heavy_imports(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pipeline.__main__ import _main\n"
        "try:\n"
        "    _main(['model.weights=random', 'verify.lengths=[9999]'])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'matplotlib', 'tensorrt', 'z3', 'numpy', 'pynvml'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )

    assert done.stdout.splitlines() == ["verify.lengths=9999: outside the profile shape.min=2..shape.max=2048", "[]"]


def test_every_field_of_the_schema_can_be_set_from_the_command_line() -> None:
    from pipeline.config.schema import Config

    assert {field.name for field in fields(Config)} - {"notes"} == set(schema_keys())  # notes come out, not in
    assert schema_keys("model.architecture") == [] and schema_keys("nowhere.at.all") == []
