"""The model: its weights, its tokenizer, and texts to run it on."""
