"""Bytes of the discrete path: against torch's operators where those do the work, else by hand."""

from __future__ import annotations

import pytest
import torch
from bytes_moved import BytesMoved
from layer_shapes import changed, shape

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.plan.discrete_kernels import SORTED_ID_BYTES, discrete_kernels
from vqmoe_megatron.plan.flops import layer_flops
from vqmoe_megatron.plan.kernels import Kernel
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.vq.codebook import build_codebook
from vqmoe_megatron.vq.codebook_update import StepStatistics
from vqmoe_megatron.vq.losses import quantization_losses

T, H, K = 4096, 512, 256
LAYER = shape(
    num_local_tokens=T, hidden_size=H, moe_ffn_hidden_size=64, num_moe_experts=8, num_codes=K,
    execution="code_space",
)  # fmt: skip


def kernels(layer: LayerShape, device: str = "cpu") -> list[Kernel]:
    return list(discrete_kernels(layer, layer_flops(layer), device))


def named(layer: LayerShape, name: str, phase: str, device: str = "cpu") -> Kernel:
    (found,) = (k for k in kernels(layer, device) if (k.name, k.phase) == (name, phase))
    return found


def test_the_kernels_of_the_losses_read_tokens_and_codes_once() -> None:
    layer = changed(LAYER, bytes_per_element=2)
    forward = named(layer, "VQ losses", "forward", "cuda")
    assert (forward.read_bytes, forward.written_bytes) == (T * H * (2 + 4), 0)
    backward = named(layer, "VQ losses", "backward", "cuda")
    assert backward.written_bytes == 2 * T * H * 2  # the gradient, and its sum with the token's
    assert backward.read_bytes == T * H * (2 + 4) + 2 * T * H * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [1, 4])
def test_losses_move_what_torch_moves(dtype: torch.dtype, slices: int) -> None:
    layer = changed(LAYER, bytes_per_element=dtype.itemsize, num_code_slices=slices)
    x = torch.randn(T, H, dtype=dtype, requires_grad=True)
    vectors, ids = torch.randn(slices, K, H // slices), torch.randint(0, K, (T, slices))
    with BytesMoved() as forward:
        commitment, _ = quantization_losses(x, vectors, ids)
    with BytesMoved() as backward:
        commitment.backward()
    if slices > 1:  # torch joins the slices by one copy more, on the CPU as on a GPU
        forward.read -= T * H * 4
        forward.written -= T * H * 4
        backward.read -= T * H * 4
        backward.written -= T * H * 4
    planned = named(layer, "VQ losses", "forward")
    assert forward.read == pytest.approx(planned.read_bytes, rel=0.02)
    assert forward.written == pytest.approx(planned.written_bytes, rel=0.02)
    planned, added = named(layer, "VQ losses", "backward"), T * H * dtype.itemsize
    assert backward.read == pytest.approx(planned.read_bytes - 2 * added, rel=0.02)
    assert backward.written == pytest.approx(planned.written_bytes - added, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_recorded_microbatch_moves_what_torch_moves(dtype: torch.dtype, update: str) -> None:
    layer = changed(LAYER, bytes_per_element=dtype.itemsize, codebook_update=update)
    codebook = build_codebook(layer.vq, H, seed=0)
    x, ids = torch.randn(T, H, dtype=dtype), torch.randint(0, K, (T, 1))
    with BytesMoved() as moved:
        codebook.record(x, ids, None)
    planned = named(layer, "segment sums", "backward")
    sorts = T * SORTED_ID_BYTES * (2 if update == "ema" else 1)  # within torch's operator
    both = planned.read_bytes + planned.written_bytes - 2 * sorts
    assert moved.read + moved.written == pytest.approx(both, rel=0.06)


@pytest.mark.parametrize(
    ("update", "revival"),
    [("ema", "random"), ("gradient", "random"), ("reanchor", "random"), ("ema", "error")],
)
def test_an_update_moves_what_torch_moves(update: str, revival: str, monkeypatch) -> None:
    layer = changed(LAYER, codebook_update=update, revival=revival)
    codebook = build_codebook(layer.vq, H, seed=0)
    total = torch.randn(1, K, H) if update == "ema" else None
    statistics = StepStatistics(torch.full((1, K), 16.0), total, torch.randn(K, 1, H))
    monkeypatch.setattr(  # of the probes, which are a kernel of their own
        codebook, "search", lambda x: torch.zeros(x.shape[0], 1, dtype=torch.int64)
    )
    codebook.apply_step(statistics)
    parts = (statistics.count, statistics.total, statistics.candidates)
    with BytesMoved() as moved:  # all sums in one buffer, to be reduced; then the update
        torch.cat([part.reshape(-1) for part in parts if part is not None])
        codebook.apply_step(statistics)
    planned = [k for k in kernels(layer) if k.phase == "step" and k.name != "probes"]
    assert moved.read == pytest.approx(sum(k.read_bytes for k in planned), rel=0.05)
    assert moved.written == pytest.approx(sum(k.written_bytes for k in planned), rel=0.05)
    assert all(k.part == "codebook statistics" for k in planned)


def test_the_combine_reads_each_tensor_once() -> None:
    """bf16 outputs, fp32 table, two fp32 weights, int64 ids: slots of rows, then the kernel."""
    layer = changed(LAYER, bytes_per_element=2, expert_model_parallel_size=4)
    forward = named(layer, "gather, scale, add", "forward")
    ids, weights, outputs, gathered = T * 8, 2 * T * 4, T * H * 2, T * H * 4
    assert forward.read_bytes == 2 * ids + weights + outputs + gathered
    assert forward.written_bytes == ids + outputs
    backward = named(layer, "gather, scale, add gradients", "backward")
    assert backward.read_bytes == outputs + ids + gathered + outputs + weights
    assert backward.written_bytes == outputs + weights
    sums = named(layer, "sums by row", "backward")
    assert sums.read_bytes == T * H * 4 + T * SORTED_ID_BYTES
    assert sums.written_bytes == K * H * 4 + T * SORTED_ID_BYTES  # 64 slots on each of 4 ranks


def test_straight_through_brings_rows_to_the_owners_and_back() -> None:
    layer = changed(LAYER, bytes_per_element=2, expert_model_parallel_size=4, norm="none")
    found = {k.name: k for k in kernels(layer) if k.part == "straight-through"}
    assert found["grouped products"].unit == "bf16_tensor_core"
    # every row is sorted, regrouped and brought back: four gathers, and two sorts of ids
    assert found["rows"].read_bytes == 4 * T * H * 2 + 2 * T * SORTED_ID_BYTES
    inner = 64 * 2  # fc1's slopes: gathered, multiplied by fc2's gradient
    assert found["slopes"].written_bytes == 2 * T * inner
    nothing = changed(layer, straight_through="none")
    assert not [k for k in kernels(nothing) if k.part == "straight-through"]


def test_what_a_setting_leaves_out() -> None:
    assert kernels(changed(LAYER, path="continuous", execution="auto")) == []
    frozen = changed(LAYER, codebook_update="gradient", freeze_codebook=True)
    trained = changed(LAYER, codebook_update="gradient")
    names = [{k.name for k in kernels(layer)} for layer in (frozen, trained)]
    assert names[1] - names[0] == {"gradients of codes"}
    for off in ({"commitment_coeff": 0.0}, {"vq_loss_coeff": 0.0}):
        for device in ("cpu", "cuda"):
            found = kernels(changed(LAYER, **off), device)
            assert [k.phase for k in found if k.name == "VQ losses"] == ["forward"]
    low = changed(LAYER, bytes_per_element=2, code_dim=32)
    projected = named(low, "projection gradients", "backward")
    assert projected.unit == "fp32_fma"
    assert projected.operations == layer_flops(low)["projection"].backward
    assert isinstance(low.vq, VQConfig) and low.vq.quantizer == "low_dim"
