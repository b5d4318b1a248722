"""PyTorch's own ways of running the same model, as rows of the same table."""
