"""Kernels are told apart by their names, as CUDA and torch write them."""

from __future__ import annotations

import pytest

from vqmoe_megatron.gpu_proof.step_profile import kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_nearest_kernel", "search"),
        ("_forward_kernel", "combine"),
        ("_backward_kernel", "combine"),
        ("aten::_grouped_mm", "grouped products"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::"
         "kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<cute::tuple<int>>>>>",
         "grouped products"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float>", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>",
         "optimizer"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<Policy>", "sort and scan"),
        ("void at::native::(anonymous namespace)::compute_grad_weight_embedding", "sums by id"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collectives"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("something new", "other"),
    ],
)  # fmt: skip
def test_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind
