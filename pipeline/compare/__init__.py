"""Reports side by side: which row won, by how much, and whether to believe it (``python -m pipeline.compare``)."""
