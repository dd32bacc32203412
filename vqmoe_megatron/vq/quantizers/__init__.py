"""Quantizers: the space in which a token's nearest code is found, one file each."""
