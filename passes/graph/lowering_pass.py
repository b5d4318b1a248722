"""The proof inside somebody else's compiler: on the graph that Torch-TensorRT hands to its lowering passes."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor
from torch.fx import GraphModule

from passes.errors import RunError
from passes.graph.lowerings import without_mask
from passes.graph.lowerings.lowering import ANY
from passes.private.of_torch import with_numbers, writes
from passes.proof.calls import AttentionCall, find_calls, native_gqa
from passes.proof.masks import Proof, Prover
from passes.proof.sizes import asserted, ranges_of_inputs

LARGEST_CONSTANT = 2**16
"""Elements of a weight that may be a table which a mask is made of; larger ones are not looked at."""


def prover_in(graph_module: GraphModule) -> Prover:
    """The prover of a graph whose weights are its module's own: every placeholder is an input, and of its sizes is
    known what its own shape environment has recorded, which is what the engine's profile is made of."""
    graph = graph_module.graph
    inputs = frozenset(node.name for node in graph.find_nodes(op="placeholder"))
    written = {node.args[0] for node in graph.nodes if writes(node.target)}
    constants: dict[str, Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        value = attrgetter(str(node.target))(graph_module)
        if isinstance(value, Tensor) and value.numel() <= LARGEST_CONSTANT and node not in written:
            constants[node.name] = value.detach()
    return Prover(ranges_of_inputs(graph), inputs, constants, asserted=asserted(graph))


def rewrite_proved(graph_module: GraphModule) -> list[tuple[AttentionCall, Proof]]:
    """Rewrite, in place, each attention call of ``graph_module`` whose mask is proved causal or to block nothing.

    What is not proved stays as it is, and so does a graph without attention; returns what was found of each call.
    ``torch.compile`` calls its back ends in a mode in which no tensor holds numbers; the second look needs them.
    """
    with with_numbers():
        return _rewrite_proved(graph_module)


def _rewrite_proved(graph_module: GraphModule) -> list[tuple[AttentionCall, Proof]]:
    try:
        calls = find_calls(graph_module)
    except RunError:  # no attention, or one with dropout
        return []
    prover = prover_in(graph_module)
    found: list[tuple[AttentionCall, Proof]] = []
    for call in calls:
        if not all("val" in source.meta for source in call.node.all_input_nodes):
            continue
        proof = prover.prove(call)
        found.append((call, proof))
        lowering = without_mask(call, proof, ANY)
        if call.mask is None or lowering is None:
            continue
        as_it_was = call.node.args, call.node.kwargs
        native_gqa(call, prover.ranges)
        try:
            lowering.write(graph_module.graph, call)
        except RunError:  # a form that the layers do not take
            call.node.args, call.node.kwargs = as_it_was
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    return found
