"""Files for others: the rewritten graph for torch alone, and the engine for torch and Torch-TensorRT."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import save_tiny_llama
from runs import DONE, GPU, artifacts, do, mlflow_run
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from passes.errors import UserError
from passes.graph.rewrite import in_aten
from passes.tensorrt.versions import device_stood_in, load_stack
from pipeline.__main__ import compose_config
from pipeline.engine import pt2
from pipeline.host.files import sha256_of
from pipeline.run import Outcome

EXPORT = ["export.format=[pt2]", "shape.max=32", "benchmark=none"]
LENGTHS = (2, 13, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def exported(store: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return do(store, tmp_path_factory.mktemp("runs"), folder, "precision=fp32", *EXPORT)


def wide(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


OTHER = """
import sys, torch
for module in {imports!r}:
    __import__(module)
asked = torch.load(sys.argv[2], weights_only=True)
call = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    torch.save([call(**each) for each in asked], sys.argv[3])
print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{
    "torch_tensorrt", "tensorrt", "transformers", "passes", "pipeline"}}))
"""


def elsewhere(file: Path, asked: list[dict[str, Tensor]], imports: tuple[str, ...] = ()) -> tuple[list[Any], str]:
    """What ``file`` gives for ``asked`` in a process that cannot import ours, and which libraries that had loaded."""
    into, out = file.with_suffix(".asked"), file.with_suffix(".given")
    torch.save(asked, into)
    code = OTHER.format(imports=imports)
    arguments = [sys.executable, "-P", "-c", code, str(file), str(into), str(out)]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not Path(path, "pipeline").is_dir()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(arguments, cwd=file.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = torch.load(out, weights_only=True)
    into.unlink(), out.unlink()
    return given, done.stdout.strip()


# The graph, for torch alone


def test_graph_pt2_answers_as_pytorch_does_at_every_length_with_torch_alone(exported: Outcome, folder: Path) -> None:
    asked = [{"input_ids": tiny.tokens(1, length, seed=length)} for length in LENGTHS]
    given, loaded = elsewhere(exported.folder / "graph.pt2", asked)

    assert loaded == "[]"
    with torch.no_grad():
        for inputs, logits in zip(asked, given, strict=True):
            torch.testing.assert_close(logits, wide(folder)(**inputs).logits[:, -1:], atol=1e-5, rtol=1e-4)


def test_graph_pt2_refuses_a_length_outside_of_the_profile(exported: Outcome) -> None:
    call = torch.export.load(exported.folder / "graph.pt2").module()
    with pytest.raises(Exception, match="32"):
        call(input_ids=tiny.tokens(1, 33))


@pytest.mark.parametrize(
    "strategy",
    [
        "detect_causal",
        "decompose",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lowering", "mask_input", "upstream")),
    ],
)
def test_every_strategys_graph_is_the_same_in_torchs_own_operations(strategy: str) -> None:
    program = tiny.rewritten(strategy, None, "llama").program
    plain = in_aten(program)

    assert pt2.foreign_operations(plain) == []
    for length in LENGTHS[1:]:
        tokens = tiny.tokens(1, length)
        assert torch.equal(tiny.logits(program, input_ids=tokens), tiny.logits(plain, input_ids=tokens))


def test_operations_of_ours_are_what_torch_alone_lacks() -> None:
    program = tiny.rewritten("detect_causal", None, "llama").program
    assert pt2.foreign_operations(program) == ["proved_attention.native.default"]


def test_masks_that_were_proved_away_leave_nothing_behind_in_graph_pt2() -> None:
    """``detect_causal`` keeps the mask beside the call as evidence; the file has none to compute."""
    graph = in_aten(tiny.rewritten("detect_causal", None, "llama").program).graph
    calls = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert [(call.args[3:], call.kwargs["scale"]) for call in calls] == [((None, 0.0, True), 0.25)] * 2
    compared = (torch.ops.aten.le.Tensor, torch.ops.aten.eq.Tensor)
    assert not any(node.target in compared for node in graph.nodes)


# The engine


class Opened(pickle.Unpickler):
    """Reads what Torch-TensorRT would hand to its runtime, and hands it to nobody."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return (lambda fields: fields) if name == "_reconstruct_trt_engine" else found


def fields_of(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The fields of Torch-TensorRT's engine in ``path``, and the graph around it."""
    load_stack()
    with zipfile.ZipFile(path) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return Opened(io.BytesIO(entries["data/constants/opaque_obj_0"])).load(), json.loads(entries["models/model.json"])


def field(fields: list[Any], name: str) -> Any:
    from torch_tensorrt.dynamo.runtime import _serialized_engine_layout as layout

    return fields[getattr(layout, f"{name}_IDX")]


def test_engine_pt2_holds_the_verified_engine_as_torch_tensorrt_saves_one(exported: Outcome) -> None:
    import base64

    fields, program = fields_of(exported.folder / "engine.pt2")

    assert base64.b64decode(field(fields, "ENGINE")) == (exported.folder / "engine.trt").read_bytes()
    assert (field(fields, "INPUT_BINDING_NAMES"), field(fields, "OUTPUT_BINDING_NAMES")) == ("input_ids", "output0")
    assert field(fields, "HW_COMPATIBLE") == ("0" if GPU else "1")  # built ahead of time: for several GPUs
    graph = program["graph_module"]["graph"]
    assert next(node["target"] for node in graph["nodes"]) == "torch.ops.tensorrt.execute_engine.default"
    (limits,) = program["range_constraints"].values()
    assert (limits["min_val"], limits["max_val"]) == (2, 32)


def test_torch_tensorrt_knows_the_shapes_of_what_the_engine_gives(exported: Outcome) -> None:
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

    fields, _ = fields_of(exported.folder / "engine.pt2")
    shapes = TorchTensorRTModule.decode_metadata(field(fields, "SERIALIZED_METADATA"))["inout_symexprs"]
    assert [(each["shape_exprs"], each["dtype"]) for each in shapes["outputs"]] == [([1, 1, 128], torch.float32)]
    (tokens,) = shapes["inputs"]
    assert tokens["shape_exprs"][0] == 1 and tokens["shape_exprs"][1].is_Symbol and tokens["dtype"] == torch.int64


@pytest.mark.skipif(GPU, reason="about a machine without a GPU")
def test_engine_pt2_is_whole_up_to_the_gpu_that_it_asks_for(
    exported: Outcome, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU ``torch.export.load`` reads all of it, and fails where Torch-TensorRT looks for the device."""
    load_stack()
    with pytest.raises(RuntimeError, match="deserializing"), device_stood_in():
        torch.export.load(exported.folder / "engine.pt2")

    from torch_tensorrt.dynamo.runtime import _TRTEngine as runtime

    monkeypatch.setattr(runtime, "_reconstruct_trt_engine", runtime.EngineSerializer)
    extra = {pt2.MANIFEST: ""}
    program = torch.export.load(exported.folder / "engine.pt2", extra_files=extra)
    assert program.graph_signature.user_inputs == ("input_ids",)
    assert json.loads(extra[pt2.MANIFEST])["sha256"] == exported.report["engine"]["sha256"]
    assert program.call_spec.in_spec.num_leaves == 1


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="runs engines")
@pytest.mark.parametrize("extra", [[], ["model.inputs=[input_ids,attention_mask]", "strategy.assume=[no_padding]"]])
def test_engine_pt2_gives_what_the_engine_gives_with_torch_and_torch_tensorrt_alone(
    extra: list[str], store: str, folder: Path, tmp_path: Path
) -> None:
    from pipeline.engine.runner import open_engine

    outcome = do(store, tmp_path, folder, *EXPORT, *extra)
    names = [spec["name"] for spec in json.loads((outcome.folder / "engine.json").read_text())["inputs"]]
    asked = [{name: tiny.tokens(1, n, seed=n).cuda() for name in names} for n in LENGTHS]
    for each in asked:
        each |= {name: torch.ones_like(each[name]) for name in names if name == "attention_mask"}
    given, loaded = elsewhere(outcome.folder / "engine.pt2", asked, ("torch_tensorrt",))
    engine = open_engine(outcome.folder / "engine.trt")

    assert "pipeline" not in loaded and "passes" not in loaded
    for inputs, logits in zip(asked, given, strict=True):
        torch.testing.assert_close(logits, engine(inputs), atol=1e-2, rtol=1e-2)
    assert outcome.report["export"]["files"]["engine.pt2"]["executed"]
    graph = torch.export.load(outcome.folder / "graph.pt2")  # on the CPU, wherever it was traced
    assert {tensor.device.type for tensor in graph.state_dict.values()} == {"cpu"}
    graph.module()(**{name: tensor.cpu() for name, tensor in asked[0].items()})


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="runs engines")
@pytest.mark.parametrize("cache", ["in_engine", "static"])
def test_engines_with_a_cache_generate_what_their_graphs_do(
    cache: str, store: str, folder: Path, tmp_path: Path
) -> None:
    outcome = do(store, tmp_path, folder, *EXPORT, f"cache={cache}", "cache.capacity=128")
    prompt = tiny.tokens(1, 13)
    graphs = [torch.export.load(outcome.folder / name).module() for name in ("graph.pt2", "decode_graph.pt2")]
    engines = [torch.export.load(outcome.folder / name).module() for name in ("engine.pt2", "decode.pt2")]
    wanted = continued(*graphs, prompt, cache, torch.float16)
    assert continued(*engines, prompt.cuda(), cache, torch.float16).cpu().tolist() == wanted.tolist()


# With a KV cache


def continued(prefill: Any, decode: Any, prompt: Tensor, cache: str, dtype: torch.dtype, new: int = 6) -> Tensor:
    """``new`` tokens behind ``prompt``, greedily, by the two programs of a tiny Llama with a cache of 128 tokens."""
    layers, heads, size, capacity = 2, 2, 16, 128
    shapes = [(1, heads, capacity, size)] * layers + [(1, heads * size, capacity, 1)] * layers
    empty = [torch.zeros(shape, dtype=dtype, device=prompt.device) for shape in shapes]
    tokens, length = [], prompt.shape[1]
    with torch.no_grad():
        if cache == "in_engine":
            logits, *caches = prefill(input_ids=prompt, keys=empty[:layers], values=empty[layers:])
        else:
            logits, *filled = prefill(input_ids=prompt)
            for whole, part in zip(empty, filled, strict=True):
                whole[:, :, :length] = part
            caches = empty
        for step in range(new):
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            place = torch.tensor([length + step], device=prompt.device)
            logits, *caches = decode(input_ids=tokens[-1], position=place, keys=caches[:layers], values=caches[layers:])
    return torch.cat(tokens, 1)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["in_engine", "static"])
def test_the_two_graphs_of_a_run_with_a_cache_generate_what_the_model_does(
    cache: str, store: str, folder: Path, tmp_path: Path
) -> None:
    outcome = do(store, tmp_path, folder, "precision=fp32", *EXPORT, f"cache={cache}", "cache.capacity=128")
    files = outcome.report["export"]["files"]
    assert list(files) == ["engine.pt2", "graph.pt2", "decode.pt2", "decode_graph.pt2"]
    prefill, decode = (torch.export.load(outcome.folder / name).module() for name in ("graph.pt2", "decode_graph.pt2"))

    prompt = tiny.tokens(1, 13)
    model, wanted = wide(folder), prompt
    with torch.no_grad():
        for _ in range(6):
            wanted = torch.cat([wanted, model(wanted).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert continued(prefill, decode, prompt, cache, torch.float32).tolist() == wanted[:, 13:].tolist()
    fields, program = fields_of(outcome.folder / "decode.pt2")
    inputs = ["input_ids", "position", "keys_0", "keys_1", "values_0", "values_1"]
    assert field(fields, "INPUT_BINDING_NAMES") == "%".join(inputs)
    assert field(fields, "OUTPUT_BINDING_NAMES") == "%".join(f"output{i}" for i in range(5))
    assert len(program["graph_module"]["graph"]["outputs"]) == 5


# What the run says of them


def test_the_report_says_what_each_file_is_and_what_of_it_was_executed(exported: Outcome) -> None:
    assert exported.report["status"] == DONE and exported.report["stages_s"]["write"] > 0
    said = exported.report["export"]
    assert said["not_written"] == {} and list(said["files"]) == ["engine.pt2", "graph.pt2"]
    for name, each in said["files"].items():
        path = exported.folder / name
        assert (each["bytes"], each["sha256"]) == (path.stat().st_size, sha256_of(path))
    engine, graph = said["files"].values()
    assert engine["needs"] == ["torch", "torch_tensorrt"] and engine["target"] == exported.report["engine"]["target"]
    assert graph["needs"] == ["torch"] and graph["target"] is None
    assert (engine["executed"], graph["executed"]) == (GPU, not GPU)


def test_a_file_checks_no_condition_and_its_engine_lacks_what_nothing_reads(
    store: str, folder: Path, tmp_path: Path
) -> None:
    assumed = ["model.inputs=[input_ids,attention_mask]", "strategy.assume=[no_padding]"]
    one_length = ["shape=static"]  # else the length may be read off the mask
    outcome = do(store, tmp_path, folder, *EXPORT, *assumed, *one_length, "tracking.log_engine=false")

    assert "nothing in engine.pt2, graph.pt2 checks that no_padding holds" in outcome.report["notes"]
    fields, program = fields_of(outcome.folder / "engine.pt2")
    assert field(fields, "INPUT_BINDING_NAMES") == "input_ids"  # though the program takes both
    signature = program["graph_module"]["signature"]["input_specs"]
    assert [each["user_input"]["arg"]["as_tensor"]["name"] for each in signature if "user_input" in each] == [
        "input_ids", "attention_mask",
    ]  # fmt: skip
    assert not any(name.endswith((".pt2", ".trt")) for name in artifacts(store, mlflow_run(store, outcome).info.run_id))


@pytest.mark.slow
def test_an_engine_out_of_the_store_is_exported_too(store: str, folder: Path, tmp_path: Path) -> None:
    kept = ["store.enabled=true", f"store.folder={tmp_path / 'engines'}", "precision=fp32"]
    do(store, tmp_path / "first", folder, *kept, "shape.max=32", "benchmark=none")
    outcome = do(store, tmp_path / "second", folder, *kept, *EXPORT)

    assert outcome.report["store"]["hit"] and "build" not in outcome.report["stages_s"]
    assert {"engine.pt2", "graph.pt2"} <= artifacts(store, mlflow_run(store, outcome).info.run_id)
    stored = next(path for path in (tmp_path / "engines").iterdir() if path.is_dir())
    assert list(stored.glob("*.pt2")) == []  # the weights are in the engine already


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["export.format=[onnx]"], "export.format=onnx: allowed are pt2"),
        (["export.format=[pt2,pt2]"], r"export.format=\[pt2,pt2\]: name pt2 once"),
        (["export.format=pt2"], "export.format=pt2: must be a list"),
    ],
)
def test_a_format_that_there_is_not_is_refused_in_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose_config(overrides)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["backend=eager"], "backend=eager builds no engine"),
        (["backend=torch_compile"], "backend=torch_compile builds no engine"),
        (["until=verify"], "until=verify stops before anything is exported"),
    ],
)
def test_where_there_is_nothing_to_export_the_setting_is_refused(overrides: list[str], why: str) -> None:
    from pipeline.config.idle import refuse_idle

    config = compose_config([*overrides, "export.format=[pt2]"])
    with pytest.raises(UserError, match=f"has no part in this run, since {why}"):
        refuse_idle({"export.format": "export.format=[pt2]"}, [config], sweep=False)
    assert not config.exports
