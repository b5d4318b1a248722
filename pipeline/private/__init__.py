"""What the libraries of the pipeline make no promise about: a module each, as in :mod:`passes.private`."""
