"""Both search kernels against brute force in fp64 and against the search in plain torch.

Integer-valued inputs make every distance exact, so ties are real ties and ids must agree exactly.
The kernel runs interpreted on the CPU, and compiled where there is a CUDA device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from kernel_places import PLACES, run_kernel, skip_unless_possible

from vqmoe_megatron.vq.search import nearest_code

KERNELS = ["fp32", "split"]
everywhere = pytest.mark.parametrize(
    "way", list(itertools.product(PLACES, KERNELS)), ids=lambda way: "-".join(way)
)
Way = tuple[str, str]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def integers(*shape: int, seed: int = 0, limit: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()


def brute_force(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """[T, H], [K, H] -> the first code at the smallest squared distance, in fp64."""
    return (x.double()[:, None] - codes.double()[None]).square().sum(dim=-1).argmin(dim=1)


def kernel(name: str) -> Callable:
    from vqmoe_megatron.vq.search_triton import nearest_code_triton
    from vqmoe_megatron.vq.split_search_triton import nearest_code_split

    return {"fp32": nearest_code_triton, "split": nearest_code_split}[name]


def search(way: Way, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    place, name = way
    skip_unless_possible(place)
    found = run_kernel(place, kernel(name), x, codes)
    assert found.dtype == torch.int64
    return found


@everywhere
@pytest.mark.parametrize(
    ("num_tokens", "num_codes", "width"),
    [(37, 53, 7), (1, 1, 1), (5, 1, 33), (16, 16, 32), (33, 17, 65), (3, 130, 40)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_brute_force(
    way: Way, num_tokens: int, num_codes: int, width: int, dtype: torch.dtype
) -> None:
    x, codes = integers(num_tokens, width), integers(num_codes, width, seed=1)
    assert torch.equal(search(way, x.to(dtype), codes), brute_force(x, codes))
    assert torch.equal(search(way, x.to(dtype), codes.to(dtype)), brute_force(x, codes))


@everywhere
def test_equals_the_search_in_plain_torch_on_real_numbers(way: Way) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(70, 48, generator=generator)
    codes = torch.randn(90, 48, generator=generator)
    assert torch.equal(search(way, x, codes), nearest_code(x, codes))
    assert torch.equal(search(way, x, codes), brute_force(x, codes))


@everywhere
def test_no_tokens(way: Way) -> None:
    assert search(way, torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0,)
    assert search(way, torch.zeros(0, 4), torch.zeros(2, 3, 2)).shape == (0, 2)


@everywhere
def test_ties_inside_a_block_go_to_the_lowest_index(way: Way) -> None:
    codes = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 7.0]])
    assert search(way, x, codes).tolist() == [1, 1, 0]


@everywhere
@pytest.mark.parametrize("num_tokens", [1, 50])  # one token splits the codes among programs
def test_ties_between_blocks_and_splits_go_to_the_lowest_index(way: Way, num_tokens: int) -> None:
    codes = integers(11, 4, seed=1, limit=1).repeat(30, 1)  # every code thirty times
    x = integers(num_tokens, 4, limit=1)
    found = search(way, x, codes)
    assert torch.equal(found, brute_force(x, codes))
    assert int(found.max()) < 11


@everywhere
def test_a_large_common_part_does_not_hide_small_differences(way: Way) -> None:
    generator = torch.Generator().manual_seed(5)
    common = 1000 * torch.randn(1, 24, generator=generator)
    codes = common + 0.05 * torch.randn(40, 24, generator=generator)
    x = codes[torch.randint(40, (64,), generator=generator)]
    x = x + 0.005 * torch.randn(64, 24, generator=generator)
    found = search(way, x, codes)
    assert torch.equal(found, brute_force(x, codes))
    # Without the shift fp32 would lose them, so this test can fail.
    unshifted = codes.square().sum(dim=1) * 0.5 - x @ codes.t()
    assert not torch.equal(unshifted.argmin(dim=1), found)


@everywhere
def test_bf16_tokens_are_searched_in_fp32(way: Way) -> None:
    # Neighbouring codes 1 and 1 + 1/1024 are one number in bf16; fp32 codes keep them apart.
    codes = torch.tensor([[1.0 + 2**-10], [1.0]])
    x = torch.tensor([[1.0]], dtype=torch.bfloat16)
    assert search(way, x, codes).tolist() == [1]


@everywhere
def test_product_codes_are_one_search_per_slice(way: Way) -> None:
    x, codes = integers(60, 15), integers(3, 19, 5, seed=1)
    found = search(way, x, codes)
    assert found.shape == (60, 3)
    for c in range(3):
        assert torch.equal(found[:, c], brute_force(x[:, 5 * c : 5 * c + 5], codes[c]))


@everywhere
@pytest.mark.parametrize("layout", ["column slice", "every other token", "transposed"])
def test_strided_tokens(way: Way, layout: str) -> None:
    codes = integers(21, 6, seed=1)
    if layout == "column slice":
        x = integers(40, 20)[:, 7:13]
    elif layout == "every other token":
        x = integers(80, 6)[::2]
    else:
        x = integers(6, 40).t()
    assert not x.is_contiguous()
    assert torch.equal(search(way, x, codes), brute_force(x, codes))
    strided_codes = integers(21, 30, seed=1)[:, 3:9]
    assert torch.equal(search(way, x, strided_codes), brute_force(x, strided_codes))
    slices = integers(2, 21, 3, seed=2)
    found = search(way, x, slices)
    for c in range(2):
        assert torch.equal(found[:, c], brute_force(x[:, 3 * c : 3 * c + 3], slices[c]))


@everywhere
def test_tokens_that_are_no_numbers_get_an_index_in_range_and_harm_no_other(way: Way) -> None:
    x, codes = integers(40, 6), integers(21, 6, seed=1)
    wanted = brute_force(x, codes)
    x[3, 2], x[17] = float("nan"), float("inf")
    x[20, 0] = -float("inf")
    found = search(way, x, codes)
    assert int(found.min()) >= 0 and int(found.max()) < 21
    healthy = torch.ones(40, dtype=torch.bool)
    healthy[[3, 17, 20]] = False
    assert torch.equal(found[healthy], wanted[healthy])
    single = search(way, torch.full((2, 3), float("nan")), torch.full((9, 3), float("nan")))
    assert 0 <= int(single.min()) and int(single.max()) < 9


@everywhere
@pytest.mark.parametrize(
    ("x", "codes", "message"),
    [
        ((5, 4), (3, 5), r"do not fit: need x \[T, H\]"),
        ((5, 4), (2, 3, 3), r"do not fit: need x \[T, H\]"),
        ((5,), (3, 5), r"do not fit: need x \[T, H\]"),
        ((5, 4), (0, 4), r"codes \[1, 0, 4\] are empty"),
    ],
)
def test_what_does_not_fit_is_named(way: Way, x: tuple, codes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(way, torch.zeros(x), torch.zeros(codes))


@everywhere
def test_float64_is_refused(way: Way) -> None:
    with pytest.raises(ValueError, match="x is torch.float64; the kernel takes float32"):
        search(way, torch.zeros(5, 4, dtype=torch.float64), torch.zeros(3, 4))


@on_cuda
@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration_finds_the_same_codes(name: str) -> None:
    # Close codes, so that one other rounding of one distance would show.
    import triton

    from vqmoe_megatron.vq import search_triton, split_search_triton

    module, untuned = {
        "fp32": (search_triton, search_triton._nearest_kernel),
        "split": (split_search_triton, split_search_triton._bounds_kernel),
    }[name]
    generator = torch.Generator().manual_seed(7)
    codes = torch.randn(1, 96, generator=generator) + 1e-4 * torch.randn(
        700, 96, generator=generator
    )
    x = codes[torch.randint(700, (3000,), generator=generator)]
    x = (x + 1e-4 * torch.randn(3000, 96, generator=generator)).cuda()
    results = []
    for config in module.CONFIGS:
        tuned = triton.autotune([config], key=["codes_class", "width_class"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_tuned_kernel", tuned(untuned))
            results.append(kernel(name)(x, codes.cuda()).cpu())
    assert all(torch.equal(result, results[0]) for result in results)


def test_tensors_on_the_cpu_are_refused_without_the_interpreter() -> None:
    pytest.importorskip("triton")
    from vqmoe_megatron.vq.codes_triton import IS_INTERPRETED
    from vqmoe_megatron.vq.search_triton import nearest_code_triton

    if IS_INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set in this process")
    with pytest.raises(ValueError, match="x is on cpu .* or TRITON_INTERPRET=1"):
        nearest_code_triton(torch.zeros(5, 4), torch.zeros(3, 4))


@on_cuda
def test_nearest_code_uses_the_kernels_on_cuda() -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(4096, 64, generator=generator).cuda()
    codes = torch.randn(4096, 64, generator=generator).cuda()
    wanted = kernel("fp32")(x, codes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = nearest_code(x, codes)
    extra = torch.cuda.max_memory_allocated() - before
    assert torch.equal(found, wanted)
    assert extra < 4096 * 4096  # bytes: a quarter of the distances in fp32
