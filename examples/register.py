"""Way 3: one line, and every graph that Torch-TensorRT compiles is proved and converted; the script stays as it is.

``python examples/register.py`` shows what Torch-TensorRT's lowering makes of a model before and after; with a GPU it
compiles it.
"""

from __future__ import annotations

import torch
from torch.export import Dim, ExportedProgram
from transformers import LlamaConfig, LlamaForCausalLM

import passes


def lowered(exported: ExportedProgram) -> list[str]:
    """The attention calls that Torch-TensorRT's converters get to see."""
    torch_tensorrt = passes.load_torch_tensorrt()
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering

    settings = torch_tensorrt.dynamo.CompilationSettings(device=torch_tensorrt.Device(gpu_id=0))
    graph = post_lowering(exported.run_decompositions(get_decompositions()).module(), settings)
    calls = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
    return [f"mask {node.args[3] if len(node.args) > 3 else None}, {node.kwargs}" for node in calls]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=8, num_key_value_heads=2, use_cache=False)  # fmt: skip
    model = LlamaForCausalLM(config).half().to(device).eval()
    tokens = torch.randint(512, (1, 64), device=device)
    length = {1: Dim("length", min=2, max=2048)}
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": tokens}, dynamic_shapes={"input_ids": length})
        print("before:", *lowered(exported), sep="\n  ")
        passes.register()
        print("after:", *lowered(exported), sep="\n  ")
    if device == "cpu":
        return print("no GPU: Torch-TensorRT compiles for the GPU that is there, so this is where it ends")
    compiled = torch.compile(model, backend="torch_tensorrt", dynamic=False, options={"min_block_size": 1})
    with torch.no_grad():
        print("TensorRT:", float((compiled(input_ids=tokens).logits - model(input_ids=tokens).logits).abs().max()))


if __name__ == "__main__":
    main()
