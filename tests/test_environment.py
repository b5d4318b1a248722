"""The environment section: right versions, the right commit, and nothing heavy to find them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from pipeline.host.plain_json import to_json
from pipeline.record.environment import environment, git_commit, module_version, supported_by_vendor
from pipeline.record.own_code import BESIDE_A_FIGURE, code_hash

KEYS = [
    "gpu", "compute_capability", "supported_by_vendor", "driver", "torch", "torch_tensorrt", "tensorrt", "flavour",
    "transformers", "python", "git", "code",
]  # fmt: skip


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=surroundings).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit, of ``package/__init__.py``."""
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "__init__.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_the_section_has_the_reports_keys_and_the_installed_versions() -> None:
    section = environment()
    assert list(to_json(section)) == KEYS
    assert section.torch == metadata.version("torch")
    assert section.transformers == metadata.version("transformers")
    assert section.python == platform.python_version()
    assert section.code == code_hash(beside=BESIDE_A_FIGURE)
    if section.flavour is not None:
        assert section.flavour in ("tensorrt", "tensorrt_rtx")
        assert section.torch_tensorrt and section.tensorrt


def test_what_the_caller_knows_of_tensorrt_wins() -> None:
    known = {"torch_tensorrt": "9.8.7", "tensorrt": "6.5", "flavour": "tensorrt"}
    assert known.items() <= to_json(environment(known)).items()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_its_entries_are_null() -> None:
    section = environment()
    assert (section.gpu, section.compute_capability, section.supported_by_vendor) == (None,) * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
def test_a_gpu_is_named_with_its_driver() -> None:
    section = environment()
    assert section.gpu == torch.cuda.get_device_name()
    assert section.compute_capability == "{}.{}".format(*torch.cuda.get_device_capability())
    assert section.driver


A_CARD = """
import os, sys, types
nvml = types.ModuleType("pynvml")
nvml.NVMLError = type("NVMLError", (Exception,), {})
nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
nvml.nvmlSystemGetDriverVersion = lambda: "580"
nvml.nvmlDeviceGetCount = lambda: 2
nvml.nvmlDeviceGetHandleByIndex = int
nvml.nvmlDeviceGetHandleByUUID = str
nvml.nvmlDeviceGetName = lambda handle: f"card {handle}"
nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: (9, 0)
sys.modules["pynvml"] = nvml
import torch
torch.cuda.is_available = lambda: True
def initialise(): raise SystemExit("CUDA was initialised")
torch.cuda._lazy_init = initialise
"""


CARDS = """
from pipeline.host import gpu
for visible in sys.argv[1:]:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible != "all":
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    try:
        print(gpu.card().name)
    except SystemExit as initialised:
        print(initialised)
"""


def test_which_card_it_is_can_be_told_without_cuda() -> None:
    names = {"all": "card 0", "1": "card 1", "1,0": "card 1", "GPU-8f": "card GPU-8f", "MIG-8f": "CUDA was initialised"}
    surroundings = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    command = [sys.executable, "-c", A_CARD + CARDS, *names]
    ran = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    assert dict(zip(names, ran.stdout.splitlines(), strict=True)) == names, ran.stderr


def test_what_a_sweeps_jobs_are_forked_from_does_not_initialise_cuda() -> None:
    script = A_CARD + "import pipeline.sweep.preload; print('torch_tensorrt' in sys.modules)"
    surroundings = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=surroundings)
    assert (ran.stdout.strip(), ran.stderr, ran.returncode) == ("False", "", 0)


@pytest.mark.parametrize(
    ("flavour", "capability", "expected"),
    [
        ("tensorrt_rtx", "7.0", False),
        ("tensorrt_rtx", "7.5", True),
        ("tensorrt_rtx", "8.0", True),
        ("tensorrt_rtx", "8.7", False),
        ("tensorrt_rtx", "8.9", True),
        ("tensorrt_rtx", "9.0", False),
        ("tensorrt_rtx", "10.0", False),
        ("tensorrt_rtx", "12.0", True),
        ("tensorrt_rtx", "12.1", True),
        ("tensorrt", "7.0", False),
        ("tensorrt", "7.5", True),
        ("tensorrt", "9.0", True),
        ("tensorrt", "10.0", True),
        ("tensorrt", None, None),
        (None, "9.0", None),
    ],
)
def test_support_is_what_the_vendor_lists(flavour: str | None, capability: str | None, expected: bool | None) -> None:
    assert supported_by_vendor(flavour, capability) is expected


def test_an_unpacked_module_without_metadata_still_tells_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unpacked_runtime").mkdir()
    (tmp_path / "unpacked_runtime" / "__init__.py").write_text('__version__ = "1.4.0.76"\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert module_version("unpacked_runtime") == "1.4.0.76"
    assert module_version("no_such_runtime") is None


def test_the_commit_is_that_of_the_files_checkout_and_not_of_the_current_folder(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("")
    git(elsewhere, "init", "-q")
    git(elsewhere, "add", ".")
    git(elsewhere, "commit", "-q", "-m", "another")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))
    assert git_commit(checkout / "package" / "__init__.py") == git(checkout, "rev-parse", "HEAD")


def test_a_changed_file_makes_the_commit_dirty_and_a_tag_does_not_hide_it(checkout: Path) -> None:
    git(checkout, "tag", "-a", "v1", "-m", "a tag")
    (checkout / "package" / "__init__.py").write_text("changed = True\n")
    assert git_commit(checkout / "package" / "__init__.py") == git(checkout, "rev-parse", "HEAD") + "-dirty"


def test_a_package_installed_inside_someone_elses_checkout_has_no_commit(checkout: Path, tmp_path: Path) -> None:
    installed = checkout / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_commit(installed / "__init__.py") is None
    (tmp_path / "alone.py").write_text("")
    assert git_commit(tmp_path / "alone.py") is None


def test_measuring_modules_import_without_torch() -> None:
    code = (
        "import sys; from pipeline.host import gpu; from pipeline.measure import prompt, roofline, statistics; "
        "from pipeline.record import environment; "
        "sys.exit([name for name in ('torch', 'transformers', 'tensorrt', 'pynvml') if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
