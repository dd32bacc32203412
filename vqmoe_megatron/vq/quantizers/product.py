"""product: the nearest of K code vectors in each of C slices of the token."""

from __future__ import annotations

from vqmoe_megatron.vq.codebook import Codebook


class Product(Codebook):
    """One code per slice (Jegou et al. 2011, product quantization): K^C different outputs."""
