"""What runs a compiled model: its pieces, their cache, CUDA graphs."""
