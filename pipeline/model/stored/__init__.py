"""Checkpoints whose weights come quantised: what each format stores for a layer, and the weight that it stands for."""
