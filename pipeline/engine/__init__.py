"""From a rewritten program to the bytes of an engine, and what runs it."""
