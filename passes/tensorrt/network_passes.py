"""The passes over a lowered graph, before its operations are converted, in the order in which they run."""

from __future__ import annotations

from torch.fx import GraphModule

from passes.graph.driver import Pass
from passes.tensorrt import few_bits, gates, heads, network_form, rows

PASSES: tuple[Pass[GraphModule], ...] = (
    Pass("write_known_sizes", network_form.prepare),
    Pass("share_weights", few_bits.share),
    Pass("write_squares", rows.write_squares, optional=True),
    Pass("fuse_rows", rows.fuse, optional=True),
    Pass("join_queries_and_keys", rows.join, optional=True),
    Pass("read_heads_twice", heads.read_twice, optional=True),
    Pass("multiply_gates", gates.multiply_gates, optional=True),
)
