"""How a rewritten graph becomes TensorRT's layers; the installed Torch-TensorRT and TensorRT."""
