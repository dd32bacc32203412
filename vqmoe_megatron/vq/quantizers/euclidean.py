"""euclidean: the nearest of K code vectors of full width."""

from __future__ import annotations

from vqmoe_megatron.vq.codebook import Codebook


class Euclidean(Codebook):
    """Tokens and codes as they are (van den Oord et al. 2017, arXiv 1711.00937)."""
