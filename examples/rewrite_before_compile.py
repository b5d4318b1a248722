"""Way 1: rewrite an exported program, then compile it as before.

``python examples/rewrite_before_compile.py`` prints what the masks are and what becomes of them; with a GPU it compiles
the program with Torch-TensorRT, whose own converters then find attention without a mask, and compares the answers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaForCausalLM

import passes


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=8, num_key_value_heads=2)  # fmt: skip
    model = Logits(LlamaForCausalLM(config).half().to(device)).eval()
    tokens = torch.randint(512, (1, 64), device=device)
    with torch.no_grad():
        exported = torch.export.export(model, (tokens,), dynamic_shapes=({1: Dim("length", min=2, max=2048)},))

    print(passes.classify(exported))
    fixed = passes.rewrite(exported)
    for call in fixed.calls:
        print(f"{call.name}: {call.mask}, {call.proof} -> {call.action}")

    with torch.no_grad():
        before = exported.module()(tokens)
        print("PyTorch, before and after:", float((fixed.program.module()(tokens) - before).abs().max()))
    if device == "cpu":
        return print("no GPU: Torch-TensorRT compiles for the GPU that is there, so this is where it ends")
    torch_tensorrt = passes.load_torch_tensorrt()
    inputs = [torch_tensorrt.Input(min_shape=(1, 2), opt_shape=(1, 2048), max_shape=(1, 2048), dtype=torch.int64)]
    engine = torch_tensorrt.dynamo.compile(fixed.program, inputs=inputs, min_block_size=1)
    print("TensorRT:", float((engine(tokens) - before).abs().max()))


if __name__ == "__main__":
    main()
