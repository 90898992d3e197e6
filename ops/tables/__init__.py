"""Tile configurations per GPU, `<name of the GPU>.json`: `zoo tune` writes them, `ops/_tuning.py` reads them."""
