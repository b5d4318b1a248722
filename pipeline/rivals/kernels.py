"""The kernels that PyTorch computes a rival's attention by: those of its backend, for as long as a pass of it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pipeline.private.of_transformers import attention_named, configs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.config.schema import BackendConfig


class Kernels:
    """``cudnn``: torch may choose cuDNN's attention, which on Hopper it prefers, and which plans anew for every length.
    ``attention``: the name of the function of transformers that computes it, ``flex_attention`` say; None: the model's
    own.  Masks are made as for that function."""

    def __init__(self, model: PreTrainedModel, cudnn: bool = False, attention: str | None = None) -> None:
        self._cudnn, self._attention, self._configs = cudnn, attention, configs_of(model)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(self._cudnn)
        try:
            if self._attention is None:
                yield
            else:
                with attention_named(self._configs, self._attention):
                    yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)


def kernels_of(backend: BackendConfig, model: PreTrainedModel) -> Kernels:
    return Kernels(model, bool(backend.cudnn_attention), backend.attention)
