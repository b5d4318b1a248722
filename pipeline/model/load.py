"""The load stage: a causal LM at the run's precision, and the same weights one type wider to judge it by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from passes.errors import UserError, message_line, whole_message
from passes.precision import PRECISIONS, Kind
from passes.quantised import QuantisedWeight
from pipeline.config.schema import ModelConfig
from pipeline.host import gpu
from pipeline.model import checkpoint, config_json, few_bits
from pipeline.model.gguf import quiet
from pipeline.model.sections import Model
from pipeline.model.stored import folder
from pipeline.private.of_transformers import has_sdpa

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be traced, and where it came from."""

    model: PreTrainedModel
    """In eval mode, without gradients, no KV cache, attention through ``scaled_dot_product_attention`` where its class
    has that."""
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    source: str
    """Repository, package or folder of the weights; for random weights what was drawn for."""
    revision: str | None
    """Version or commit that was loaded."""
    sha256: str | None
    """Of the weights' file or files, see :class:`pipeline.model.checkpoint.Checkpoint`; None for random weights."""
    parameters: int
    """Number of parameters; tied ones count once."""
    weights: str
    notes: tuple[str, ...] = ()
    """What the reader of the report must know of how it was loaded."""
    quantised: Mapping[str, QuantisedWeight] = field(default_factory=dict)
    """Layer -> its weight of fewer bits, where it has one; ``model`` has what these stand for."""
    came_as: str | None = None
    """The format in which its weights came quantised; None: they did not."""

    def describe(self) -> Model:
        return Model(self.name, self.source, self.revision, self.sha256, self.parameters, self.weights)


def load(
    config: ModelConfig,
    precision: str,
    device: torch.device,
    seed: int,
    progress: Callable[[str], None],
    keep: Kind | None = None,
) -> LoadedModel:
    """Load the model and its tokenizer; raises :class:`UserError` before it creates anything but cache entries.

    ``keep``: of weights that come quantised, those that an engine can hold as this stay so; others are dequantised.
    """
    name = Path(config.path).resolve().name if config.path is not None else config.name
    dtype = PRECISIONS[precision].dtype
    said: tuple[str, ...] = ()
    quantised: dict[str, QuantisedWeight] = {}
    came_as = None
    if config.weights == "random":
        hf_config = checkpoint.architecture(config)
        progress(f"drawing random weights of {name}")
        model = _random(hf_config, dtype, device, seed)
        source = str(Path(config.path).resolve()) if config.path is not None else "model.architecture"
        tokenizer, revision, sha256 = None, None, None
    else:
        found, where = checkpoint.find(config, progress), checkpoint.where(config)
        progress(f"reading {name}")
        tokenizer = _tokenizer(found, where)  # before the weights: it may be refused
        stored = None if found.stored is None else folder.read(found.stored, dtype, where, keep)
        model = _pretrained(found, stored, where, dtype, device, progress)
        source, revision, sha256, said = found.source, found.revision, found.sha256, found.notes
        if stored is not None:
            came_as, quantised = stored.format.name, _placed(model, stored.kept)
            few_bits.put(model, quantised)
            said += (stored.said(len(quantised), precision),)
    gpu.give_back()  # random weights were drawn in fp32; what is made next would lie there, and hold it
    parameters = sum(parameter.numel() for parameter in model.parameters())
    read = [vars(model.config), getattr(tokenizer, "init_kwargs", {})]
    notes = (*said, *dict.fromkeys(note for each in read if (note := config_json.unused_code(each))))
    return LoadedModel(
        model, tokenizer, name, source, revision, sha256, parameters, config.weights, notes, quantised, came_as
    )


def load_reference(config: ModelConfig, precision: str, device: torch.device, seed: int) -> PreTrainedModel:
    """The weights of :func:`load`, not rounded to ``precision``: float32 for fp16 and bf16, float64 for fp32.

    transformers computes rotary angles and RMS norms in float32 whatever the type of the weights; both models
    share that, so the difference between them is the rounding of everything else.
    """

    def silent(_: str) -> None: ...

    dtype = PRECISIONS[precision].reference_dtype
    if config.weights == "random":
        return _random(checkpoint.architecture(config), dtype, device, seed)
    found = checkpoint.find(config, silent, fetch=False)
    where = checkpoint.where(config)
    stored = None if found.stored is None else folder.read(found.stored, dtype, where)
    return _pretrained(found, stored, where, dtype, device, silent)


def _placed(model: PreTrainedModel, weights: Mapping[str, QuantisedWeight]) -> dict[str, QuantisedWeight]:
    """Those of ``weights`` that are one linear layer's of ``model``, and no part of a mixture's."""
    layers = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    return {
        name: each
        for name, each in weights.items()
        if name in layers and layers[name].weight.shape == each.values.shape
    }


def _random(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """transformers' own initialisation, drawn in float32 on ``device`` and then rounded to ``dtype``.

    So the same seed gives the same weights at every precision.  CPU and GPU draw different ones: a GPU draws
    a billion of them in a blink, a CPU takes tens of seconds.  Both steps go through ``from_pretrained``, which
    fills in what is missing and knows what stays in float32 (rotary frequencies, say; ``model.half()`` does not).  What
    it leaves as memory was (OpenAI GPT's products, a bias of Data2Vec's, Apertus' numbers of an activation) is seen to.
    """
    made_of, config = _class_of(config)

    def build(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
        return made_of.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, attn_implementation=_attention(made_of),
            device_map={"": device},
        )  # fmt: skip

    with quiet(), _as_user_error(made_of):
        with _seeded(device, seed):
            with _marked():
                model = build({}, torch.float32)
            _fill_marked(model, made_of)
        return _ready(model if dtype == torch.float32 else build(model.state_dict(), dtype))


def _class_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The causal LM of ``config``, and the config that it takes: that of the text within, where it is a decoder of text
    alone (Emu 3)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    made_of, text = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config.get_text_config()
    return made_of, text if made_of.config_class is type(text) else config


@contextmanager
def _marked() -> Iterator[None]:
    """Memory that torch allocates and nobody writes is NaN while the block runs, as torch has it for deterministic
    algorithms (``torch.utils.deterministic.fill_uninitialized_memory``)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _fill_marked(model: PreTrainedModel, made_of: type) -> None:
    """Draw the parameters of ``model`` that are NaN as transformers draws those of a linear layer, and give the buffers
    that are the numbers that its class begins with."""
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.isnan().any():
                parameter.normal_(0.0, spread) if parameter.dim() > 1 else parameter.zero_()
        marked = {name: each for name, each in model.named_buffers() if each.is_floating_point() and each.isnan().any()}
        if marked:
            from accelerate import init_empty_weights

            with init_empty_weights(include_buffers=False):
                begun = dict(made_of(model.config).named_buffers())
            for name, each in marked.items():
                each.copy_(begun[name])


@contextmanager
def _as_user_error(made_of: type) -> Iterator[None]:
    """Raises :class:`UserError` for what a class of transformers stumbles over in a config that it takes, and for a
    package that it needs."""
    try:
        yield
    except ImportError as error:
        raise _missing(made_of, error) from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        said = f"{type(error).__name__}: {whole_message(error)}"[:300]
        raise UserError(f"transformers cannot build {made_of.__name__} from this config ({said}); mend it") from error


def _missing(made_of: type, error: ImportError) -> UserError:
    """That a package is missing which transformers needs for ``made_of``, a tower of pictures say."""
    said, *_ = message_line(error).split(". ")
    return UserError(f"transformers cannot build {made_of.__name__} ({said}); install it")


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The generators of CPU and ``device`` seeded, and as they were before when the block ends."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # Not torch.manual_seed: it seeds every GPU, also those that fork_rng does not restore.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _pretrained(
    found: checkpoint.Checkpoint,
    stored: folder.Read | None,
    where: str,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], None],
) -> PreTrainedModel:
    from safetensors import SafetensorError

    made_of, config = _class_of(found.config)
    try:
        with quiet():
            model, info = made_of.from_pretrained(
                found.folder if stored is None else None,
                state_dict=None if stored is None else stored.tensors,
                config=config,
                dtype=dtype,
                attn_implementation=_attention(made_of),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
                device_map={"": device},
            )
    except ImportError as error:
        raise _missing(made_of, error) from None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{where}: its weights cannot be read ({' '.join(str(error).split())})") from None
    # transformers only warns and draws random numbers for these.
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:
            first = sorted(map(str, info[what]))[0]
            raise UserError(f"{where}: weights do not fit its config ({what}: {len(info[what])}, {first} first)")
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        progress(f"{len(unused)} tensors of {where} are not part of {type(model).__name__}, {unused[0]} first")
    return _ready(model)


def _attention(made_of: type) -> str:
    """What models of this class compute attention by; what that becomes in an engine is said in
    :mod:`pipeline.model.attention`."""
    return "sdpa" if has_sdpa(made_of) else "eager"


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def _tokenizer(found: checkpoint.Checkpoint, where: str) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    if found.tokenizer is None:
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(found.tokenizer, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: its tokenizer cannot be read ({reason}); mend or remove its files") from None
