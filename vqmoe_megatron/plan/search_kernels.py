"""Kernels of the nearest-code search of one microbatch on one rank.

T tokens, H hidden size, C slices, K codes per slice, D columns of a code, e bytes of a token's
element in the codebook's space.

    split   D >= 64 on a GPU: bf16 tokens meet codes that are split into a high and a low bf16 part,
            2 products of 2 T K D operations per slice on the tensor cores, with fp32 sums; fp32
            tokens are cut in the kernel too and need 3. Tokens whose two nearest codes are closer
            than the error bound are searched again by fp32 multiply-adds.
    plain   everywhere else: 2 T K D per slice in fp32.

fp32 tokens: those of an fp32 model, and low_dim's projected ones. low_dim multiplies tokens by its
projection [D, H] in fp32 first.
"""

from __future__ import annotations

from vqmoe_megatron.plan.flops import projection_flops
from vqmoe_megatron.plan.hardware import BF16_TENSOR_CORE, FP32_FMA
from vqmoe_megatron.plan.kernels import FORWARD, FP32_BYTES, Kernel, moved
from vqmoe_megatron.plan.shape import LayerShape

LEAST_SPLIT_WIDTH = 64  # columns of a code from which the split search is taken
UNCERTAIN_SHARE_PERCENT = 2  # of tokens searched again; an assumption until a GPU has measured it
BF16_BYTES, ID_BYTES = 2, 8
FOUND_BYTES = 12  # of a token and slice between the kernels: two distances and an index
CUT_READS = 3  # of the codes: for their mean, the distances from it, and the cut


def search_kernels(layer: LayerShape, device: str) -> list[Kernel]:
    """The search that ``device`` (cpu | cuda) takes, with what brings tokens into the codebook's
    space; nothing without a codebook."""
    if not layer.vq.has_codes:
        return []
    if layer.vq.has_implicit_codes:
        return [*_into_space(layer), _rounding(layer)]
    is_split = device == "cuda" and layer.code_width >= LEAST_SPLIT_WIDTH
    search = split_search(layer) if is_split else plain_search(layer)
    return [*_into_space(layer), *search]


def space_bytes_per_element(layer: LayerShape) -> int:
    """e: fp32 behind a projection, else the model's dtype."""
    return FP32_BYTES if layer.vq.code_dim is not None else layer.bytes_per_element


def num_space_elements(layer: LayerShape) -> int:
    """T C D, tokens in the codebook's space."""
    return layer.num_searched_rows * layer.code_width


def split_search(layer: LayerShape) -> list[Kernel]:
    """By the tensor cores, and fp32 multiply-adds for uncertain tokens."""
    element, elements = space_bytes_per_element(layer), num_space_elements(layer)
    is_half = element == BF16_BYTES
    num_codes, found = _num_code_elements(layer), layer.num_searched_rows * FOUND_BYTES
    one_product = 2 * elements * layer.vq.num_codes
    parts = 2 * BF16_BYTES  # high and low
    rescored = elements * UNCERTAIN_SHARE_PERCENT // 100
    return [
        _cut_codes(layer),
        _moved("token norms", elements * element, layer.num_searched_rows * FP32_BYTES, 1),
        _product(
            "split products",
            BF16_TENSOR_CORE,
            (2 if is_half else 3) * one_product,
            elements * element + num_codes * parts,
            found,
        ),
        _moved("decision", found, layer.num_searched_rows * ID_BYTES, 3),
        _product(
            "uncertain tokens again",
            FP32_FMA,
            one_product * UNCERTAIN_SHARE_PERCENT // 100,
            rescored * element + num_codes * FP32_BYTES,
            layer.num_searched_rows * ID_BYTES * UNCERTAIN_SHARE_PERCENT // 100,
        ),
    ]


def plain_search(layer: LayerShape) -> list[Kernel]:
    """By fp32 multiply-adds alone."""
    element, elements = space_bytes_per_element(layer), num_space_elements(layer)
    code_bytes = _num_code_elements(layer) * FP32_BYTES
    id_bytes = layer.num_searched_rows * ID_BYTES
    return [
        _cut_codes(layer),
        _product(
            "fp32 products",
            FP32_FMA,
            2 * elements * layer.vq.num_codes,
            elements * element + code_bytes,
            id_bytes,
        ),
        _moved("ids", 2 * id_bytes, 2 * id_bytes, 4),
    ]


def _cut_codes(layer: LayerShape) -> Kernel:
    """vq/codes_triton.py: the mean, the most central code, the codes minus it and their parts."""
    num_codes = _num_code_elements(layer)
    written_bytes = num_codes * (FP32_BYTES + 2 * BF16_BYTES)
    return _moved("codes cut", CUT_READS * num_codes * FP32_BYTES, written_bytes, 4)


def _rounding(layer: LayerShape) -> Kernel:
    """fsq and lfq: each of D numbers by itself, and its place in the code's number."""
    elements, id_bytes = num_space_elements(layer), layer.num_local_tokens * ID_BYTES
    passes = 2 * layer.code_width * id_bytes  # the numbers so far, read and written
    read, written = elements * FP32_BYTES + passes, passes
    return _moved("rounding", read, written, 4 * layer.code_width)


def _into_space(layer: LayerShape) -> list[Kernel]:
    element, tokens = layer.bytes_per_element, layer.num_local_tokens
    inputs = tokens * layer.hidden_size
    if layer.vq.code_dim is not None:
        width = layer.vq.code_dim
        cast = [_moved("tokens to fp32", inputs * element, inputs * FP32_BYTES, 1)]
        projection = _product(
            "projection",
            FP32_FMA,
            tokens * projection_flops(layer),
            (inputs + width * layer.hidden_size) * FP32_BYTES,
            tokens * width * FP32_BYTES,
        )
        return [*(cast if element != FP32_BYTES else []), projection]
    if layer.vq.quantizer == "cosine":  # norm, quotient, scale; of tokens and codes
        codes = _num_code_elements(layer) * FP32_BYTES
        read, written = inputs * element + codes, inputs * element + codes
        return [_moved("normalisation", 3 * read, 2 * written, 8)]
    return []


def _num_code_elements(layer: LayerShape) -> int:
    """C K D."""
    return layer.num_code_rows * layer.code_width


def _moved(name: str, read: int, written: int, launches: int) -> Kernel:
    return moved("search", name, FORWARD, read, written, launches)


def _product(name: str, unit: str, operations: int, read: int, written: int) -> Kernel:
    return Kernel("search", name, FORWARD, unit, operations, read, written)
