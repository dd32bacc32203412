"""Vector quantisation without communication: codebooks, search, code maps, permutation plans."""

from vqmoe_megatron.vq.code_map import CodeMap
from vqmoe_megatron.vq.codebook import Codebook
from vqmoe_megatron.vq.search import nearest_code

__all__ = ["CodeMap", "Codebook", "nearest_code"]
