"""AWQ by NVIDIA ModelOpt: the input channels that matter most are widened before weights are rounded to int4.

Activation-aware weight quantisation: Lin and others, MLSys 2024.  ModelOpt (``nvidia-modelopt``, the extra
``quantize``) looks at the rows of each layer and searches, for each layer by itself, by how much; the rows are
multiplied by the inverse.  What is taken from it are these factors and the weights that go with them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passes.errors import UserError
from passes.tensorrt.versions import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def widened(
    model: PreTrainedModel, layers: dict[str, nn.Linear], block: int | None, texts: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> its weight float32 [out, in], some input channels widened, and the factors float32 [in] of its rows.

    ``model`` itself stays as it is.  Raises :class:`UserError` without ModelOpt.
    """
    quantization = _modelopt()
    searched = copy.deepcopy(model).float()  # on a CPU products of 16 bits take many times those of 32

    def read(each: nn.Module) -> None:
        for tokens in texts:
            each(input_ids=tokens, use_cache=False)

    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        quantization.quantize(searched, _config(quantization, list(layers), block), read)
    found = {}
    for name in layers:
        layer: Any = searched.get_submodule(name)
        factors = layer.input_quantizer.pre_quant_scale
        ones = torch.ones(layer.in_features, device=layer.weight.device)
        found[name] = (layer.weight.detach().float(), ones if factors is None else factors.detach().float().reshape(-1))
    return found


def _modelopt() -> Any:
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as quantization
    except ImportError as error:
        raise UserError(
            f"quantize.method=awq: needs NVIDIA ModelOpt ({error}); install it with pip install "
            f"'proved-attention[quantize]', or set quantize.method=round"
        ) from None
    return quantization


def _config(quantization: Any, layers: list[str], block: int | None) -> dict[str, Any]:
    """ModelOpt's own for AWQ over int4, for ``layers`` alone."""
    weight = {"num_bits": 4, "block_sizes": {-1: block, "type": "static"}}
    off = {"quantizer_name": "*", "enable": False}
    return {
        **quantization.INT4_AWQ_CFG,
        "quant_cfg": [off, *({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight} for name in layers)],
    }
