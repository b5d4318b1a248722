"""Tokens one after another: with a cache, without one, and the choice of the next."""
