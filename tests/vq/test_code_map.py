"""Code maps: the mod rule, equal code counts, spread load, clusters that stay together,
refusals."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.vq.code_map import (
    CodeMap,
    balanced_map,
    build_code_map,
    clustered_map,
    mod_map,
)


def heaviest(experts: torch.Tensor, load: torch.Tensor, num_experts: int) -> float:
    """The load of the most loaded expert."""
    return float(torch.zeros(num_experts).index_add_(0, experts, load.float()).max())


def zipf_load(num_rows: int, seed: int) -> torch.Tensor:
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    return (1000.0 / (1 + torch.arange(num_rows)))[order]


@pytest.mark.parametrize(("num_rows", "num_experts"), [(4, 4), (12, 4), (10, 4), (3, 4)])
def test_mod_is_the_remainder(num_rows: int, num_experts: int) -> None:
    assert mod_map(num_rows, num_experts).tolist() == [r % num_experts for r in range(num_rows)]


@pytest.mark.parametrize("seed", range(5))
def test_balanced_has_equal_counts_and_is_no_worse_than_mod(seed: int) -> None:
    load = zipf_load(32, seed)
    experts = balanced_map(load, 8)
    assert torch.bincount(experts, minlength=8).tolist() == [4] * 8
    assert heaviest(experts, load, 8) <= heaviest(mod_map(32, 8), load, 8)


def test_balanced_spreads_a_load_that_mod_piles_up() -> None:
    load = torch.zeros(16)
    load[::4] = 10.0  # the codes of expert 0 under mod
    assert heaviest(mod_map(16, 4), load, 4) == 40.0
    assert heaviest(balanced_map(load, 4), load, 4) == 10.0


@pytest.mark.parametrize("seed", range(3))
def test_clusters_in_separated_data_end_on_one_expert_each(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = 100.0 * torch.eye(4)
    cluster = torch.randperm(24, generator=generator) % 4
    codes = centres[cluster] + torch.randn(24, 4, generator=generator)
    experts = clustered_map(codes, 4)
    assert torch.bincount(experts, minlength=4).tolist() == [6] * 4
    for c in range(4):
        assert experts[cluster == c].unique().numel() == 1


def test_clustered_keeps_equal_counts_where_clusters_are_unequal() -> None:
    codes = torch.cat([torch.randn(20, 3), 50 + torch.randn(4, 3)])
    assert torch.bincount(clustered_map(codes, 4), minlength=4).tolist() == [6] * 4
    same = torch.ones(8, 3)
    assert torch.bincount(clustered_map(same, 4), minlength=4).tolist() == [2] * 4


def test_clustered_terminates_when_the_first_assignment_is_already_final() -> None:
    assert clustered_map(torch.eye(3), 3).unique().numel() == 3
    assert clustered_map(torch.eye(3), 3, num_iterations=1).unique().numel() == 3


def test_build_serves_product_codes_by_row() -> None:
    codes, load = torch.randn(2, 6, 3), torch.ones(2, 6)
    for kind in ("mod", "balanced", "clustered"):
        experts = build_code_map(kind, codes, load, 4)
        assert experts.shape == (12,) and experts.dtype == torch.int64
        assert torch.bincount(experts, minlength=4).tolist() == [3] * 4


def test_module_maps_slices_by_their_own_rows() -> None:
    code_map = CodeMap(num_slices=2, num_codes=5, num_experts=4)
    ids = torch.tensor([[0, 0], [4, 3]])
    assert code_map.row_ids(ids).tolist() == [[0, 5], [4, 8]]
    assert code_map(ids).tolist() == [[0, 1], [0, 0]]
    code_map.assign(torch.arange(10).flip(0) % 4)
    assert code_map(ids).tolist() == [[9 % 4, 4 % 4], [5 % 4, 1 % 4]]
    assert "expert_of_row" in code_map.state_dict()


@pytest.mark.parametrize("kind", ["balanced", "clustered"])
def test_unequal_counts_are_refused_with_the_numbers(kind: str) -> None:
    with pytest.raises(ValueError, match=r"10 % 4 = 2"):
        build_code_map(kind, torch.randn(1, 10, 3), torch.ones(1, 10), 4)


def test_unknown_kind_names_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="mod, balanced, clustered"):
        build_code_map("random", torch.randn(1, 8, 3), torch.ones(1, 8), 4)
