"""Way 2: attention by our converter, for masks of every kind, in Torch-TensorRT's own compilation.

``python examples/native_attention.py`` shows which calls the converter takes; with a GPU it compiles them with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import passes
from passes.tensorrt.registry import SDPA, takes


class Window(nn.Module):
    """Grouped heads behind a window of 16, which is no causal mask, with rows of padding that see nothing."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> Tensor:
        places = torch.arange(query.shape[2], device=query.device)
        behind = places[:, None] - places
        mask = (behind >= 0) & (behind < 16) & real[:, None, None] & real[:, None, :, None]
        return scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, value = (torch.randn(2, heads, 64, 32, device=device).half() for heads in (8, 2, 2))
    real = torch.ones(2, 64, dtype=torch.bool, device=device)
    real[1, 48:] = False
    exported = torch.export.export(Window().eval(), (query, key, value, real))

    print(passes.classify(exported))
    print("converted by us:", [takes(node) for node in exported.graph.nodes if node.target is SDPA])
    wanted = Window()(query, key, value, real)
    print("rows that see nothing are 0 in PyTorch:", bool((wanted[1, :, 48:] == 0).all()))
    if device == "cpu":
        return print("no GPU: Torch-TensorRT compiles for the GPU that is there, so this is where it ends")
    torch_tensorrt = passes.load_torch_tensorrt()
    with passes.native_attention():
        engine = torch_tensorrt.dynamo.compile(exported, inputs=[query, key, value, real], min_block_size=1)
    print("TensorRT:", float((engine(query, key, value, real) - wanted).abs().max()))


if __name__ == "__main__":
    main()
