"""The machine that a run is on: its disk, its signals, its memory, its card."""
