"""Private parts of libraries: used in passes/private and pipeline/private alone, and there as the libraries have them.

Where one of these fails after an update, the library has changed: the message names what is gone.
"""

from __future__ import annotations

import ast
import functools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from imports import ROOT
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from passes.errors import UserError
from passes.private import of_torch, of_torch_tensorrt
from passes.private.part import attribute, part
from passes.tensorrt.versions import load_stack, tensorrt_errors
from pipeline.private import of_hydra, of_mlflow, of_transformers

OURS = ("passes", "pipeline", "examples")
MAY = {
    "_exit",  # os._exit is documented
    "_target_",  # Hydra's documented key
}


@functools.cache
def sources() -> list[tuple[Path, ast.Module]]:
    paths = (path for package in OURS for path in sorted((ROOT / package).rglob("*.py")))
    return [(path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def is_private(name: str) -> bool:
    return bool(re.match(r"_[^_]", name)) and name not in MAY


def own_names() -> set[str]:
    """What our own sources define or set under a private name."""
    names: set[str] = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def foreign_parts(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private modules and names of others that are imported, and private attributes that nothing of ours has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.split(".")[0] not in OURS:
                full = [f"{module}.{alias.name}" for alias in node.names]
                yield from (name for name in full if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            text = ast.unparse(node)
            if not re.match(r"(torch\.ops\.)?aten\.", text):  # the name of an operation, such as aten._to_copy
                yield text
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield ast.unparse(node)


def test_private_parts_of_libraries_are_used_in_one_place() -> None:
    own = own_names()
    found = {str(path): list(foreign_parts(tree, own)) for path, tree in sources()}
    elsewhere = {path: parts for path, parts in found.items() if parts and "/private/" not in path}
    assert elsewhere == {}


def test_nothing_of_ours_mocks_or_rewrites_what_others_read() -> None:
    for path, tree in sources():
        if path.parts[0] in ("passes", "pipeline"):
            code = ast.unparse(tree)
            assert "unittest" not in code and not re.search(r"sys\.argv\S* = ", code), path


def test_a_part_that_is_gone_is_named_with_its_library_and_a_remedy() -> None:
    gone = rf"torch {re.escape(torch.__version__)}: has no torch\.nn\.Gone\._x any more, .*pyproject\.toml"
    with pytest.raises(UserError, match=gone):
        part("torch.nn:Gone._x")
    with pytest.raises(UserError, match=r"torch \S+: has no torch\._gone\.x any more"):
        part("torch._gone:x")
    with pytest.raises(UserError, match=r"torch \S+: has no torch\.nn\.modules\.linear\.Linear\._gone any more"):
        attribute(torch.nn.Linear(1, 1), "_gone")


def test_torch_says_of_an_operation_what_it_reads_gives_and_writes() -> None:
    aten = torch.ops.aten
    names = [argument.name for argument in of_torch.schema_of(aten.add.Tensor).arguments]
    assert names == ["self", "other", "alpha"] and len(of_torch.schema_of(aten.max.dim).returns) == 2
    assert of_torch.schema_of(len) is None
    assert [of_torch.writes(each) for each in (aten.add_.Tensor, aten.add.Tensor, len)] == [True, False, False]
    assert [of_torch.is_composite(each) for each in (aten.reshape.default, aten.add.Tensor)] == [True, False]


def test_torch_lets_a_mode_see_operations_and_dynamo_counts_what_it_compiles() -> None:
    seen = []

    class Mode(of_torch.DispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).add(1)
    assert torch.ops.aten.add.Tensor in seen

    before = of_torch.compiled_graphs()
    compiled = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)
    tensor = torch.ones(2)
    of_torch.stays_in_place(tensor)
    compiled(tensor)
    of_torch.set_to_zero(counted := [torch.ones(2), torch.ones(1)])
    assert [each.sum() for each in counted] == [0, 0]
    assert of_torch.compiled_graphs() == before + 1 and of_torch.skipped_cuda_graphs() == 0
    with pytest.raises(of_torch.compile_error()):
        torch.compile(lambda x: x if x.sum() > 0 else -x, backend="eager", fullgraph=True)(tensor)


def test_torch_tensorrt_has_its_converters_and_passes_in_lists_and_a_builder_configuration() -> None:
    stack = load_stack()
    (first, *_) = of_torch_tensorrt.converters()[torch.ops.aten.add.Tensor]
    assert callable(first.converter_implementation)
    assert "constant_fold" in [each.__name__ for each in of_torch_tensorrt.lowering_passes()]

    settings = stack.torch_tensorrt.dynamo.CompilationSettings(
        device=stack.torch_tensorrt.Device(gpu_id=0), optimization_level=2, workspace_size=2**20, max_aux_streams=0
    )
    graph = torch.fx.symbolic_trace(torch.nn.Identity())
    from torch_tensorrt.dynamo.conversion import TRTInterpreter

    config = of_torch_tensorrt.builder_config(TRTInterpreter(graph, [], compilation_settings=settings))
    assert (config.builder_optimization_level, config.max_aux_streams) == (2, 0)
    assert config.get_memory_pool_limit(stack.trt.MemoryPoolType.WORKSPACE) == 2**20


def test_what_tensorrt_logs_as_an_error_is_collected_though_logging_is_off() -> None:
    from torch_tensorrt.logging import TRT_LOGGER

    severity = load_stack().trt.ILogger.Severity
    logging.disable(logging.CRITICAL)
    try:
        with tensorrt_errors() as errors:
            TRT_LOGGER.log(severity.ERROR, "one")
            TRT_LOGGER.log(severity.WARNING, "two")
    finally:
        logging.disable(logging.NOTSET)
    assert errors == ["one"]


def test_hydras_parser_knows_the_options_that_are_asked_for() -> None:
    parsed = of_hydra.parser().parse_args(["-m", "--config-name", "x", "a=1,2"])
    assert (parsed.multirun, parsed.config_name, parsed.overrides) == (True, "x", ["a=1,2"])
    asked = ("help", "hydra_help", "info", "shell_completion", "cfg", "config_path", "config_dir", "experimental_rerun")
    assert [name for name in asked if not hasattr(parsed, name)] == []


def test_hydra_starts_on_arguments_that_are_handed_over(tmp_path: Path) -> None:
    silent = "defaults: [_self_, override hydra/job_logging: none, override hydra/hydra_logging: none]\n"
    (tmp_path / "config.yaml").write_text(f"{silent}a: 1\nhydra: {{run: {{dir: .}}, output_subdir: null}}\n")
    composed: list[Any] = []
    of_hydra.start(["a=2"], composed.append, tmp_path)
    assert [dict(each) for each in composed] == [{"a": 2}]


def test_mlflow_asks_a_server_once_and_says_that_none_is_there() -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=r"127\.0\.0\.1"):
        of_mlflow.post("http://127.0.0.1:9", "/api/2.0/mlflow/experiments/search", 1, {"max_results": 1})


def test_transformers_says_what_a_model_can_do_and_gates_its_experts() -> None:
    assert of_transformers.has_sdpa(type(tiny.model("llama")))
    config = tiny.model("llama").config
    config.update({"num_local_experts": 2, "hidden_act": "silu"})
    experts = MixtralExperts(config)
    inner = torch.randn(2, 3, 2 * config.intermediate_size)
    gate, up = inner.chunk(2, -1)
    torch.testing.assert_close(of_transformers.gated(experts, inner), torch.nn.functional.silu(gate) * up)
