"""The Triton core of the local ops: a tile of queries against a box of keys."""
