"""Transformer-XL: attention by relative positions, and the memory of the segments before."""
