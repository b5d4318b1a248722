"""One table of precisions: right, light, and the only one."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import torch
from conftest import CONF
from imports import modules

from passes.precision import FEW_BITS, PRECISIONS, Precision

EVERY = [pytest.param(each, id=name) for name, each in PRECISIONS.items()]


@pytest.mark.parametrize("precision", EVERY)
def test_an_entry_says_of_its_type_what_torch_says(precision: Precision) -> None:
    limits, wider = torch.finfo(precision.dtype), torch.finfo(precision.reference_dtype)
    assert (precision.bytes, precision.epsilon) == (precision.dtype.itemsize, limits.eps)
    assert precision.unit_roundoff == limits.eps / 2
    assert wider.eps < limits.eps and wider.bits == max(32, 2 * limits.bits)


def test_names_of_precisions_cost_no_import_of_torch() -> None:
    code = "import sys, pipeline.config.checks as c; assert 'fp16' in c.PRECISIONS and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_people_read_of_the_setting_names_every_precision() -> None:
    for name in ("config.yaml", "hydra/help/pipeline.yaml"):
        (line,) = (line for line in (CONF / name).read_text().splitlines() if line.strip().startswith("precision"))
        assert " | ".join((*PRECISIONS, *FEW_BITS)) in line, name


def test_nothing_else_decides_by_the_name_of_a_precision() -> None:
    """No other module compares with one, or has a table of its own."""
    names = {*PRECISIONS, *FEW_BITS} - {"fp8"}  # a format of checkpoints is called so too
    found = []
    for name, path in (modules("passes") | modules("pipeline")).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            read: list[ast.expr | None] = []
            if isinstance(node, ast.Compare):
                read = [node.left, *node.comparators]
            elif isinstance(node, ast.Dict):
                read = node.keys
            if any(isinstance(each, ast.Constant) and each.value in names for each in read):
                found.append(f"{name}:{node.lineno}")
    assert found == []
