"""Finished engines, kept under a key of everything that decides them."""
