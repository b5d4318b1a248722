"""What there is to set, what was typed, and what is refused before anything is loaded."""
