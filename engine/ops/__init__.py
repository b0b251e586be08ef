"""One file an op: its NumPy meaning and the layer that records it."""
