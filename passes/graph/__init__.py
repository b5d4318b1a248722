"""What becomes of an attention call in the graph, and what else a graph is rewritten to."""
