"""What the project knows about attention masks and the native attention layer; knows nothing of files or Hydra."""
