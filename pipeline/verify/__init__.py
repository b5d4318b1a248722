"""Is it right?  Logits and tokens against PyTorch one type wider."""
