"""Sweeps: many jobs, each in a process of its own, none of them done twice, and one table at the end."""
