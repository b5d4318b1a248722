"""From a YAML file to a verified TensorRT engine of a Hugging Face causal LM."""
