"""A run's engine as what writes answers: everything that can be wrong with it is found before its bytes are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from passes.errors import UserError
from passes.tensorrt.versions import load_stack
from pipeline.deploy.described import Described
from pipeline.deploy.writers import CachedWriter, PrefixWriter, Writer
from pipeline.engine.file import check_target, read_engine
from pipeline.engine.session import Session
from pipeline.trace.call_form import InputSpec
from pipeline.verify.candidate import open_generator

OTHERWISE = 'model_config={"on_cpu": "torch"} runs its verified graph in PyTorch (--on-cpu torch at the terminal)'


def check_machine(described: Described) -> None:
    """Raises :class:`UserError` where the engine was never executed, or cannot be here."""
    if described.verified != "engine":
        raise UserError(f"its engine was never executed, and only its graph was verified; {OTHERWISE}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu is None or described.environment.gpu not in (None, gpu):
        made = described.environment
        raise UserError(
            f"was built for {described.built_for} ({made.flavour} {made.tensorrt}), and this machine has "
            f"{gpu or 'no NVIDIA GPU'}; {OTHERWISE}"
        )


def check_files(described: Described, folder: Path) -> None:
    """Raises :class:`UserError` where a manifest in ``folder`` is of another engine, or of other versions than here."""
    for engine in described.engines:
        path = folder / engine.file
        try:
            manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{engine.file}: its manifest is not beside it, or cannot be read") from None
        if manifest.get("sha256") != engine.sha256:
            raise UserError(f"{engine.file}: is of sha256 {manifest.get('sha256')}, and the model's is {engine.sha256}")
        check_target(path, manifest)


def writer(described: Described, folder: Path) -> Writer:
    """The engines in ``folder`` as a writer; raises :class:`UserError` where their bytes were changed."""
    config = described.run_config
    check_files(described, folder)
    if config.cache.name != "none":
        return CachedWriter(open_generator(folder, config.backend.cuda_graph is not False), config.shape)
    manifest, data = read_engine(folder / "engine.trt")
    specs = [InputSpec.of(each) for each in manifest["inputs"]]
    session = Session(load_stack(), data, specialise=config.shape.kind == "static")
    (output,) = session.outputs
    # Its own vocabulary is told by the engine once a length is set.
    session.fit({spec.name: spec.shape(spec.max) for spec in specs})
    every = session.shape(output)[1] > 1
    return PrefixWriter(
        session,
        [spec.name for spec in specs],
        config.shape,
        every,
        session.shape(output)[-1],
        session.dtype(output),
        torch.device("cuda"),
        output,
        config.backend.cuda_graph is not False,
    )
