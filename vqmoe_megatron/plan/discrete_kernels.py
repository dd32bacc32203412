"""Kernels of the discrete path of one microbatch on one rank: combine, straight-through, codebook.

T local tokens, H hidden size, C slices, K codes, D columns of a code, R rows of the table of code
space, M candidates. Counted from ``moe/table_combine.py``, ``moe/straight_through.py``,
``vq/losses.py``, ``vq/codebook.py`` and ``vq/codebook_update.py``. Rows gathered from the table
count once per token, although a small table stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.plan.codebook_bytes import MAX_CANDIDATES, NUM_PROBES
from vqmoe_megatron.plan.fill_kernels import fill_kernels
from vqmoe_megatron.plan.flops import Flops
from vqmoe_megatron.plan.hardware import FP32_FMA
from vqmoe_megatron.plan.kernels import (
    BACKWARD,
    FORWARD,
    FP32_BYTES,
    STEP,
    Kernel,
    model_unit,
    moved,
)
from vqmoe_megatron.plan.search_kernels import num_space_elements, space_bytes_per_element
from vqmoe_megatron.plan.shape import LayerShape

ID_BYTES = 8
SORTED_SUM_LAUNCHES = 12  # of a segment sum: sort by id, bounds, sums in a fixed order
SORTED_ID_BYTES = 128  # read, and written, to sort one int64 id with its place, in 8 passes
# Passes over [C, K, D] once per step (read, written): sums gathered and checked, update, revival,
# the choice between new and old, copies.
UPDATE_PASSES = {"ema": (23, 16), "gradient": (7, 4), "reanchor": (17, 8)}
FROZEN_PASSES = (5, 3)  # sums gathered and checked alone
CANDIDATE_PASSES = (5, 4)  # over [M, C, D]
REVIVAL_PASSES = (13, 5)  # over [M, C, D]: which were offered, and are no earlier one again
ERROR_PASSES = (5, 3)  # over [M, C, D]: their codes, and how far those are
UPDATE_LAUNCHES = 100


def discrete_kernels(layer: LayerShape, flops: dict[str, Flops], device: str) -> Iterator[Kernel]:
    """All of one layer on ``device`` (cpu | cuda); nothing without a codebook."""
    if not layer.vq.has_codes:
        return
    if layer.vq.path == "filled":
        yield from fill_kernels(layer, flops["fill"])
    else:
        yield from _combine_in_place(layer) if layer.vq.in_code_space else _combine_rows(layer)
        yield from _straight_through(layer, flops["straight_through"])
    yield from _projection_gradients(layer, flops["projection"])
    yield from _losses_by_kernel(layer) if device == "cuda" else _losses(layer)
    yield from _statistics(layer)
    yield from _update(layer)


def _combine_in_place(layer: LayerShape) -> Iterator[Kernel]:
    """Gather, scale, add; backward the gradients of both weights and of the continuous output, and
    the table's, a sum over the tokens of each row and slice."""
    part, element, exact = "combine", layer.bytes_per_element, layer.sum_bytes_per_element
    hidden = layer.num_local_tokens * layer.hidden_size
    slices, ids = layer.vq.num_code_slices, layer.num_discrete_rows * ID_BYTES
    gathered = hidden * slices * exact
    first = hidden * element if layer.vq.path == "dual" else 0  # the continuous output
    weights = 2 * layer.num_local_tokens * FP32_BYTES
    table = layer.expert_model_parallel_size * layer.num_slots * layer.hidden_size * exact
    yield moved(
        part, "gather, scale, add", FORWARD,
        2 * ids + gathered + first + weights, ids + hidden * element, 2,
    )  # fmt: skip
    grad = hidden * element
    if layer.vq.path == "dual":
        yield moved(
            part, "gather, scale, add gradients", BACKWARD,
            grad + ids + gathered + first + weights, first + weights, 1,
        )  # fmt: skip
        weighted = hidden * exact
        yield moved(part, "weighted gradients", BACKWARD, grad + weighted, weighted + grad, 2)
    else:
        yield moved(part, "gradients to fp32", BACKWARD, grad, hidden * exact, 1)
    sums = slices * (hidden * exact + layer.num_discrete_rows // slices * SORTED_ID_BYTES)
    added = (slices - 1) * table
    yield moved(
        part, "sums by row", BACKWARD, sums + 2 * added,
        slices * (table + layer.num_local_tokens * SORTED_ID_BYTES) + added,
        slices * (SORTED_SUM_LAUNCHES + 1),
    )  # fmt: skip


def _combine_rows(layer: LayerShape) -> Iterator[Kernel]:
    """Token dispatch: rows of codes made, outputs of slices summed, normed and added to the
    continuous output with the gate's fp32 weights."""
    part, element = "combine", layer.bytes_per_element
    rows, hidden = layer.num_discrete_rows * layer.hidden_size, (
        layer.num_local_tokens * layer.hidden_size
    )  # fmt: skip
    if layer.vq.expert_input != "token":
        yield moved(part, "rows of codes", FORWARD, rows * FP32_BYTES, rows * element, 4)
    if layer.vq.norm != "none":
        both = (rows + hidden) * element
        yield moved(part, "norms", FORWARD, both, both, 4)
        yield moved(part, "norms", BACKWARD, 2 * both, both, 6)
    summed = rows * element if layer.vq.num_code_slices > 1 else 0
    yield moved(part, "sum of slices", FORWARD, summed + hidden * element, 2 * hidden * element, 2)
    yield moved(part, "sum of slices", BACKWARD, hidden * element, hidden * element + summed, 2)
    if layer.vq.path == "dual":
        exact = hidden * FP32_BYTES
        yield moved(
            part, "weighted sum", FORWARD, 2 * hidden * element + 3 * exact,
            3 * exact + hidden * element, 4,
        )  # fmt: skip
        yield moved(
            part, "weighted sum", BACKWARD, 3 * hidden * element + 6 * exact,
            5 * exact + 2 * hidden * element, 9,
        )  # fmt: skip


def _straight_through(layer: LayerShape, flops: Flops) -> Iterator[Kernel]:
    """Gradients of tokens or codes through the experts at their code rows: sent to the owners,
    two grouped products with the slopes of the activation between them, and back."""
    part, element = "straight-through", layer.bytes_per_element
    hidden, width = layer.hidden_size, layer.straight_through_width
    tokens = layer.num_local_tokens
    if layer.has_code_inputs and layer.vq.straight_through == "group":
        # means over a code's tokens, read again by each of them
        rows = layer.num_discrete_rows * hidden
        read = rows * (element + FP32_BYTES) + layer.num_discrete_rows * SORTED_ID_BYTES
        written = rows * FP32_BYTES + layer.num_discrete_rows * SORTED_ID_BYTES
        launches = layer.vq.num_code_slices * SORTED_SUM_LAUNCHES + 8
        yield moved(part, "means by code", BACKWARD, read, written, launches)
    if not layer.has_code_inputs or layer.vq.straight_through == "none":
        return
    if not flops.backward:  # the tokens' gradient is that of their rows
        gradient = tokens * hidden * element
        yield moved(part, "gradients to tokens", BACKWARD, 2 * gradient, gradient, 2)
        return
    shards = layer.expert_tensor_parallel_size
    rows = shards * layer.num_gradient_rows_to_tokens
    fc1, inner = layer.fc1_width // shards, layer.moe_ffn_hidden_size // shards
    weights = layer.num_experts_per_rank * hidden * (2 * fc1 + inner) * element  # fc1's twice
    slots = layer.num_slots * (hidden + 3 * fc1) * element
    yield Kernel(
        part, "grouped products", BACKWARD, model_unit(element), flops.backward,
        rows * (hidden + fc1) * element + weights + slots, rows * (inner + hidden) * element, 3,
    )  # fmt: skip
    yield moved(
        part, "slopes", BACKWARD, rows * (2 * fc1 + inner) * element, 2 * rows * fc1 * element, 10
    )
    sent = layer.num_gradient_rows_to_tokens * hidden * element
    back = layer.num_gradient_rows_to_tokens * width * layer.straight_through_bytes_per_element
    is_exchanged = layer.expert_model_parallel_size * shards > 1
    gathers = (1 + shards if is_exchanged else 1) * (sent + back)
    sorts = (1 + shards if is_exchanged else 1) * layer.num_discrete_rows * SORTED_ID_BYTES
    launches = 45 if is_exchanged else 20
    yield moved(part, "rows", BACKWARD, gathers + sorts, gathers + sorts, launches)
    if layer.vq.norm != "none":  # forward again, and its gradient, of both norms
        normed = rows * hidden * element
        if layer.vq.num_code_slices == 1:
            normed += layer.num_gradient_rows_to_tokens * hidden * element
        yield moved(part, "norms", BACKWARD, 4 * normed, 3 * normed, 8)
    gradient = tokens * hidden * element
    yield moved(part, "gradients to tokens", BACKWARD, 2 * gradient, gradient, 2)


def _projection_gradients(layer: LayerShape, flops: Flops) -> Iterator[Kernel]:
    """low_dim: gradients into the codes' space and from there to tokens, in fp32."""
    if not flops.backward:
        return
    num_rows = flops.backward // (2 * layer.code_width * layer.hidden_size)
    lowered = num_rows - layer.num_local_tokens
    tokens, hidden, width = layer.num_local_tokens, layer.hidden_size, layer.code_width
    weights = 2 * width * hidden
    yield Kernel(
        "straight-through", "projection gradients", BACKWARD, FP32_FMA, flops.backward,
        (lowered * hidden + tokens * width + weights) * FP32_BYTES,
        (lowered * width + tokens * hidden) * FP32_BYTES, 2,
    )  # fmt: skip
    if layer.bytes_per_element != FP32_BYTES:
        cast = (lowered + tokens) * hidden
        yield moved(
            "straight-through", "projection casts", BACKWARD,
            lowered * hidden * layer.bytes_per_element + tokens * hidden * FP32_BYTES,
            cast * FP32_BYTES - tokens * hidden * (FP32_BYTES - layer.bytes_per_element), 2,
        )  # fmt: skip


def _losses(layer: LayerShape) -> Iterator[Kernel]:
    """VQ losses in plain torch; differences are taken again backward."""
    part, elements = "codebook statistics", num_space_elements(layer)
    element, slices = space_bytes_per_element(layer), layer.vq.num_code_slices
    cast = elements * element if element != FP32_BYTES else 0
    exact = elements * FP32_BYTES
    read, written = 3 * exact + cast, 2 * exact + (exact if cast else 0)  # x - v
    launches = slices + 4
    yield moved(part, "VQ losses", FORWARD, read + exact, written, launches + 4)
    read += exact + (exact if cast else 0)
    written += exact + cast
    gradient = elements * element  # added to the token's
    if _pulls_tokens(layer):
        yield moved(
            part, "VQ losses", BACKWARD, read + 2 * gradient, written + gradient, launches + 6
        )  # fmt: skip


def _losses_by_kernel(layer: LayerShape) -> Iterator[Kernel]:
    """VQ losses by losses_triton.py: tokens and the codes' rows are read once a pass."""
    part, elements = "codebook statistics", num_space_elements(layer)
    tokens = elements * space_bytes_per_element(layer)
    read = tokens + elements * FP32_BYTES
    yield moved(part, "VQ losses", FORWARD, read, 0, 5)
    # The gradient is written, read again and added to the token's.
    if _pulls_tokens(layer):
        yield moved(part, "VQ losses", BACKWARD, read + 2 * tokens, 2 * tokens, 2)


def _pulls_tokens(layer: LayerShape) -> bool:
    """Whether tokens have a gradient of the commitment loss; at 0 it is a metric."""
    return layer.vq.vq_loss_coeff > 0 and layer.vq.commitment_coeff > 0


def _statistics(layer: LayerShape) -> Iterator[Kernel]:
    """What a microbatch records: tokens per code, and their sums for the EMA."""
    part, elements = "codebook statistics", num_space_elements(layer)
    element, slices = space_bytes_per_element(layer), layer.vq.num_code_slices
    cast = elements * element if element != FP32_BYTES else 0
    exact = elements * FP32_BYTES
    code_bytes = layer.num_code_rows * layer.code_width * FP32_BYTES
    sorts = layer.num_discrete_rows * SORTED_ID_BYTES
    if layer.vq.codebook_update != "ema" and not layer.vq.freeze_codebook:
        yield moved(
            part, "gradients of codes", BACKWARD, exact + sorts, code_bytes + sorts,
            slices * SORTED_SUM_LAUNCHES + 4,
        )  # fmt: skip
    read, written = cast + exact + sorts, (exact if cast else 0) + sorts
    launches = 8 + slices * (SORTED_SUM_LAUNCHES + 1)
    if layer.vq.codebook_update == "ema":
        read, written = read + exact + sorts + 3 * code_bytes, written + sorts + 3 * code_bytes
        launches += slices * (SORTED_SUM_LAUNCHES + 1)
    yield moved(part, "segment sums", BACKWARD, read, written, launches)


def _update(layer: LayerShape) -> Iterator[Kernel]:
    """Once per step: the reduced sums move the codebook; two searches of the probe tokens, and by
    ``vq.revival`` one of the candidates."""
    part, vq = "codebook statistics", layer.vq
    num_codes = layer.num_code_rows * layer.code_width
    candidates = min(vq.num_codes, MAX_CANDIDATES)
    reads, writes = FROZEN_PASSES if vq.freeze_codebook else UPDATE_PASSES[vq.codebook_update]
    offered = candidates * vq.num_code_slices * layer.code_width
    passes = [CANDIDATE_PASSES]
    if vq.codebook_update != "reanchor" and vq.dead_code_threshold and not vq.freeze_codebook:
        passes += [REVIVAL_PASSES] + ([ERROR_PASSES] if vq.revival == "error" else [])
    read_offered, written_offered = (offered * sum(count) for count in zip(*passes, strict=True))
    yield moved(
        part, "update", STEP, (reads * num_codes + read_offered) * FP32_BYTES,
        (writes * num_codes + written_offered) * FP32_BYTES, UPDATE_LAUNCHES,
    )  # fmt: skip
    probes = min(candidates, NUM_PROBES) * vq.num_code_slices * layer.code_width
    searched = 2 * probes + (offered if ERROR_PASSES in passes else 0)
    yield Kernel(
        part, "probes", STEP, FP32_FMA, 2 * searched * vq.num_codes,
        (searched + 2 * num_codes) * FP32_BYTES, 0, 20,
    )  # fmt: skip
    if vq.codebook_update == "reanchor" and not vq.freeze_codebook:
        similar = layer.num_code_rows * candidates
        yield Kernel(
            part, "similarity of candidates", STEP, FP32_FMA, 2 * similar * layer.code_width,
            (num_codes + 2 * offered + 5 * similar) * FP32_BYTES, 5 * similar * FP32_BYTES, 12,
        )  # fmt: skip
