"""What the settings may be."""

from __future__ import annotations

STAGES = ("load", "export", "strategy", "lower", "interpret", "build", "verify", "write", "benchmark")
STRATEGIES: dict[str, tuple[str, ...]] = {  # name -> what `strategy.unproven` may be, the default first
    "detect_causal": ("mask", "decompose", "error"),
    "mask_input": (),
    "lowering": ("keep", "error", "force"),
    "decompose": (),
    "upstream": (),
}
INPUTS = ("input_ids", "attention_mask", "position_ids", "last")
OPTIONAL_PASSES = (
    "group_heads", "narrow_rows", "write_squares", "fuse_rows", "join_queries_and_keys", "read_heads_twice",
    "multiply_gates",
)  # fmt: skip
"""What `strategy.without` takes: those of `passes.graph.passes` and `passes.tensorrt.network_passes` that may be left
out, in the order in which they run."""
ASSUMPTIONS = {  # what `strategy.assume` takes (`passes.proof.conditions.CONDITIONS`) -> the input that each is about
    "contiguous_positions": "position_ids",
    "no_padding": "attention_mask",
}
BACKEND_OPTIONS: dict[str, tuple[str, ...]] = {  # option -> the backends that have it
    "optimization_level": ("tensorrt",),
    "workspace_gib": ("tensorrt",),
    "aux_streams": ("tensorrt",),
    "cuda_graph": ("tensorrt",),
    "fused_rows": ("tensorrt",),
    "mode": ("torch_compile",),
    "cudnn_attention": ("eager", "torch_compile"),
    "attention": ("torch_compile",),
    "plugin_library": ("plugin",),
}
BACKENDS = ("tensorrt", "eager", "torch_compile", "plugin")
CACHES: dict[str, tuple[str, ...]] = {  # `cache` -> the backends that have it
    "none": BACKENDS,
    "dynamic": ("eager",),
    "static": ("tensorrt", "eager", "torch_compile"),
    "in_engine": ("tensorrt", "plugin"),
}
EXPORT_FORMATS = ("pt2",)
LOGGED_MODELS = ("engine", "graph", "none")
ATTENTIONS = ("flex_attention",)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
