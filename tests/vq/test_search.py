"""nearest_code against brute force in fp64; ties, tiles, dtypes, product codes, memory.

Integer-valued inputs make every distance exact, so ties are real ties and ids must agree exactly.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_megatron.vq import search
from vqmoe_megatron.vq.search import nearest_code


def integers(*shape: int, seed: int = 0, limit: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).double()


def brute_force(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """[T, H], [K, H] -> the first code at the smallest squared distance, in fp64."""
    distances = (x.double()[:, None] - codebook.double()[None]).square().sum(dim=-1)
    return distances.argmin(dim=1)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements of any tensor an operation made."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor):
                self.num_elements = max(self.num_elements, part.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_brute_force(dtype: torch.dtype) -> None:
    x, codebook = integers(200, 8), integers(37, 8, seed=1)
    found = nearest_code(x.to(dtype), codebook.to(dtype))
    assert found.dtype == torch.int64
    assert torch.equal(found, brute_force(x, codebook))


def test_equals_brute_force_on_real_numbers() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 32, generator=generator, dtype=torch.float64)
    codebook = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))


def test_bf16_tokens_are_searched_in_fp32() -> None:
    # Neighbouring codes 1 and 1 + 1/1024 are one number in bf16; fp32 codes keep them apart.
    codebook = torch.tensor([[1.0 + 2**-10], [1.0]])
    x = torch.tensor([[1.0]], dtype=torch.bfloat16)
    assert nearest_code(x, codebook).tolist() == [1]


def test_ties_go_to_the_lowest_index() -> None:
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 7.0]])
    assert nearest_code(x, codebook).tolist() == [1, 1, 0]


@pytest.mark.parametrize(("tile_tokens", "tile_codes"), [(1, 1), (2, 3), (13, 5), (64, 40)])
def test_tiles_change_nothing_even_with_ties_between_them(
    monkeypatch: pytest.MonkeyPatch, tile_tokens: int, tile_codes: int
) -> None:
    monkeypatch.setattr(search, "MAX_TILE_TOKENS", tile_tokens)
    monkeypatch.setattr(search, "TILE_CODES", tile_codes)
    x = integers(50, 4, limit=1)
    codebook = integers(11, 4, seed=1, limit=1).repeat(3, 1)  # every code three times
    found = nearest_code(x, codebook)
    assert torch.equal(found, brute_force(x, codebook))
    assert int(found.max()) < 11


def test_more_codes_than_a_tile_holds() -> None:
    num_codes = search.TILE_CODES + 100
    codebook = torch.arange(num_codes, dtype=torch.float64).unsqueeze(1) * 4
    wanted = torch.tensor([0, 1, search.TILE_CODES - 1, search.TILE_CODES, num_codes - 1])
    assert torch.equal(nearest_code(codebook[wanted] + 1, codebook), wanted)


def test_product_codes_are_one_search_per_slice() -> None:
    x, codebook = integers(60, 12), integers(3, 9, 4, seed=1)
    found = nearest_code(x, codebook)
    assert found.shape == (60, 3)
    for c in range(3):
        assert torch.equal(found[:, c], brute_force(x[:, 4 * c : 4 * c + 4], codebook[c]))


def test_no_tensor_grows_to_tokens_times_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MAX_TILE_TOKENS", 1 << 5)
    monkeypatch.setattr(search, "TILE_CODES", 1 << 7)
    x, codebook = torch.randn(2048, 4), torch.randn(1024, 4)
    with LargestTensor() as largest:
        nearest_code(x, codebook)
    inputs = max(x.numel(), codebook.numel())
    assert largest.num_elements <= max(inputs, 1 << 12) < 2048 * 1024 // 100


@pytest.mark.parametrize("num_codes", [1, 16, 64, 255, 256, 16384])
def test_tiles_hold_many_tokens_of_few_codes_and_stay_in_the_cache(num_codes: int) -> None:
    tokens, codes = search._tile_sizes(torch.empty(0, 4), num_codes)
    tile = tokens * min(codes, num_codes)
    assert tile <= search.TILE_DISTANCES
    assert tokens == search.MAX_TILE_TOKENS or tile > search.TILE_DISTANCES // 2


def test_no_tokens_and_no_gradient() -> None:
    assert nearest_code(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0,)
    assert nearest_code(torch.zeros(0, 4), torch.zeros(2, 3, 2)).shape == (0, 2)
    x = torch.randn(3, 4, requires_grad=True)
    assert not nearest_code(x, torch.randn(3, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("x", "codebook"), [((5, 4), (3, 5)), ((5, 4), (2, 3, 3)), ((5,), (3, 5)), ((5, 4), (4,))]
)
def test_shapes_that_do_not_fit_are_named(x: tuple, codebook: tuple) -> None:
    with pytest.raises(ValueError, match=r"do not fit: need x \[T, H\]"):
        nearest_code(torch.zeros(x), torch.zeros(codebook))
