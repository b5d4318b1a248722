"""The model as a program: the call forms that are traced, with and without a cache."""
