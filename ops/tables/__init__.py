"""Tile configurations per GPU, `<name of the GPU>.json`: `zoo bench tune` writes them, `ops/_local/tuning.py` reads."""
