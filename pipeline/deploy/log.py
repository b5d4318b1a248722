"""Leaves a run's model in its folder as MLflow's ``pyfunc`` flavour, from where it is tracked as every file is.

The engine is not in it: the model names it by hash, and finds it beside itself or in its run's artifacts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.deploy import described as descriptions
from pipeline.deploy.described import Described, EngineFile, graph_hash
from pipeline.deploy.request import Settings
from pipeline.deploy.writers import why_none
from pipeline.private import of_mlflow
from pipeline.tracking.runs import MODEL
from pipeline.tracking.store import quiet

if TYPE_CHECKING:
    from pipeline.engine.sections import Engines
    from pipeline.model.load import LoadedModel
    from pipeline.record.environment import Environment
    from pipeline.verify.sections import Verification

DATA = "chat"
REQUIRED = (
    "accelerate", "filelock", "gguf", "jinja2", "mlflow", "nvidia-ml-py", "safetensors", "sqlalchemy", "torch",
    "torch-tensorrt", "torch-tensorrt-rtx", "tensorrt", "tensorrt_rtx", "transformers", "z3-solver",
)  # fmt: skip
"""What a loaded model imports; of those that are alternatives, the installed one."""
EXAMPLE = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16}


def why_not(config: Config, loaded: LoadedModel, verification: Verification) -> str | None:
    """Why a run that was verified so leaves no model; None where it leaves one."""
    asked = config.tracking.log_model
    if asked == "none":
        return "tracking.log_model=none"
    if not verification.passed or (asked == "engine" and verification.executed != "engine"):
        return "its engine was not executed and verified"
    if loaded.tokenizer is None:
        return "the model has no tokenizer"
    return why_none(config.shape, config.cache.name != "none", config.model.inputs)


def leave(
    folder: Path,
    config: Config,
    loaded: LoadedModel,
    engines: Engines,
    verification: Verification,
    environment: Environment,
) -> Iterator[str]:
    """Leave what MLflow can load and serve, where there is something to answer with; gives what must be said of it."""
    reason = why_not(config, loaded, verification)
    if reason is None:
        log(folder, config, loaded, engines, verification.executed, environment)
    elif config.tracking.log_model in ("graph", verification.executed):
        yield f"no model was logged that answers: {reason}"


def log(
    folder: Path, config: Config, loaded: LoadedModel, engines: Engines, executed: str, environment: Environment
) -> None:
    """Leave the model in the run's ``folder``, which has the engines and the graphs that they were built from."""
    from mlflow import pyfunc

    built = {"engine": engines.engine} | ({} if engines.decode is None else {"decode": engines.decode.engine})
    engine_files, graphs = [], {}
    for name, engine in built.items():
        assert engine is not None and engine.file and engine.bytes and engine.sha256
        engine_files.append(EngineFile(engine.file, engine.bytes, engine.sha256))
        text = folder / ("graph_after.txt" if name == "engine" else f"{name}_graph_after.txt")
        graphs[name] = graph_hash(text.read_text(encoding="utf-8"))
    described = Described(
        schema=descriptions.SCHEMA,
        verified=executed,
        model=loaded.describe(),
        config=config.to_dict(),
        engines=tuple(engine_files),
        built_for=environment.gpu or engines.engine.target or "any GPU",
        environment=environment,
        mlflow=version("mlflow"),
        graphs=graphs,
        settings=Settings(stop=_stop(loaded)),
    )
    with tempfile.TemporaryDirectory() as made, quiet():
        data = Path(made) / DATA
        data.mkdir()
        descriptions.write(data, described)
        assert loaded.tokenizer is not None
        loaded.tokenizer.save_pretrained(data / descriptions.TOKENIZER)
        pyfunc.save_model(
            folder / MODEL,
            loader_module="pipeline.deploy.chat_model",
            data_path=str(data),
            code_paths=[str(files(package)) for package in ("passes", "pipeline")],
            signature=of_mlflow.chat_signature(),
            input_example=EXAMPLE,
            pip_requirements=requirements(),
            model_config={"on_cpu": None},
            streamable=True,
            metadata=_metadata(described),
        )


def requirements() -> list[str]:
    """The installed versions, exactly."""
    found = []
    for name in REQUIRED:
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return found


def _metadata(described: Described) -> dict[str, Any]:
    """What MLflow shows of the model."""
    engines = {each.file: asdict(each)["sha256"] for each in described.engines}
    return {
        "task": "agent/v1/chat", "verified": described.verified, "built_for": described.built_for, "engines": engines,
    }  # fmt: skip


def _stop(loaded: LoadedModel) -> tuple[int, ...]:
    """The tokens with which the model ends a turn, by its tokenizer, its config and its generation settings."""
    generation = getattr(loaded.model, "generation_config", None)
    said = [
        getattr(loaded.tokenizer, "eos_token_id", None),
        getattr(loaded.model.config.get_text_config(), "eos_token_id", None),
        getattr(generation, "eos_token_id", None),
    ]
    tokens = {token for each in said for token in (each if isinstance(each, list) else [each]) if token is not None}
    return tuple(sorted(tokens))
