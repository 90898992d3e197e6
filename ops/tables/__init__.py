"""Tile configurations per GPU: `<name of the GPU>.json`, written by `zoo bench tune` and read by `ops/_local/tuning.py`."""
