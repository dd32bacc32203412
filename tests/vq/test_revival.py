"""Revival against a loop over dead codes, and the orders in which tokens are taken."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.vq.codebook_update import CodebookState
from vqmoe_megatron.vq.revival import (
    error_order,
    random_order,
    revive_dead_codes,
    usable_candidates,
)

C, K, D, M = 2, 5, 3, 16  # slices, codes, slice width, candidates


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(usage: torch.Tensor) -> CodebookState:
    codes = drawn(C, usage.shape[1], D)
    return CodebookState(codes, usage, codes * usage.unsqueeze(-1))


def revived_by_hand(
    old: CodebookState, candidates: torch.Tensor, order: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the map of revived ones, one code and one candidate at a time."""
    codes, revived = old.codes.clone(), torch.zeros_like(old.usage, dtype=torch.bool)
    for c in range(C):
        left: list[torch.Tensor] = []
        earlier: set[tuple] = set()
        allowed = set()
        for j in range(len(candidates)):
            vector = tuple(candidates[j, c].tolist())
            if any(vector) and vector not in earlier:
                allowed.add(j)
            earlier.add(vector)
        left = [candidates[j, c] for j in order[:, c].tolist() if j in allowed]
        for k in range(old.usage.shape[1]):
            if old.usage[c, k] < threshold / old.usage.shape[1] and left:
                codes[c, k], revived[c, k] = left.pop(0), True
    return codes, revived


def cases() -> dict[str, torch.Tensor]:
    """Candidates by name: all different, repeated, with rows nobody filled, none at all."""
    repeated = drawn(M, C, D, seed=1)
    repeated[3:9] = repeated[2]
    repeated[12, 1] = repeated[2, 1]  # in one slice only
    unfilled = drawn(M, C, D, seed=1)
    unfilled[3:] = 0.0
    return {
        "different": drawn(M, C, D, seed=1),
        "repeated": repeated,
        "unfilled": unfilled,
        "none": torch.zeros(M, C, D),
        "one": drawn(1, C, D),
    }


@pytest.mark.parametrize("by_error", [False, True])
@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("num_codes", [5, 40])
def test_equals_a_loop_over_dead_codes(name: str, num_codes: int, by_error: bool) -> None:
    candidates = cases()[name]
    usage = torch.rand(C, num_codes, generator=torch.Generator().manual_seed(2)) / num_codes
    old = state(usage)
    order = random_order(candidates, seed=5)
    if by_error:
        order = error_order(candidates, torch.zeros_like(candidates), seed=5)
    new, revived = revive_dead_codes(old, candidates, order, 0.6)
    codes, wanted = revived_by_hand(old, candidates, order, 0.6)
    assert torch.equal(new.codes, codes) and torch.equal(revived, wanted)
    assert wanted.any() or name == "none"
    uniform = torch.tensor(1.0 / num_codes)
    assert torch.equal(new.usage, torch.where(wanted, uniform, old.usage))
    sums = torch.where(wanted.unsqueeze(-1), codes / num_codes, old.ema_sum)
    torch.testing.assert_close(new.ema_sum, sums)
    for c in range(C):  # no two dead codes take the same token
        assert len(codes[c][wanted[c]].unique(dim=0)) == int(wanted[c].sum())


def test_without_sums_there_are_none_and_zero_threshold_revives_nothing() -> None:
    old = CodebookState(drawn(C, K, D), torch.zeros(C, K), None)
    candidates = drawn(M, C, D, seed=1)
    order = random_order(candidates, seed=5)
    assert revive_dead_codes(old, candidates, order, 0.5)[0].ema_sum is None
    untouched, revived = revive_dead_codes(old, candidates, order, 0.0)
    assert not revived.any() and torch.equal(untouched.codes, old.codes)


def test_the_random_order_is_a_permutation_by_its_seed() -> None:
    candidates = drawn(M, C, D)
    first, again, other = (random_order(candidates, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert sorted(first[:, 0].tolist()) == list(range(M)) and torch.equal(first[:, 0], first[:, 1])


def test_errors_draw_in_proportion_to_their_squares() -> None:
    """Errors 1, 2 and 0: four to one over 2,000 slices, and what has no error comes last."""
    candidates = torch.tensor([1.0, -2.0, 0.0]).view(3, 1, 1).expand(3, 2000, 1) + 7.0
    order = error_order(candidates, torch.full_like(candidates, 7.0), seed=1)
    assert set(order[2].tolist()) == {2}
    assert float((order[0] == 1).float().mean()) == pytest.approx(0.8, abs=0.03)
    again, other = (error_order(candidates, torch.zeros_like(candidates), s) for s in (1, 2))
    assert not torch.equal(again, other)
    assert torch.equal(order, error_order(candidates, torch.full_like(candidates, 7.0), seed=1))


def test_different_vectors_of_equal_weighted_sum_are_both_usable() -> None:
    one, other = torch.tensor([2.0**0.5, 0.0]), torch.tensor([0.0, 1.0])
    weights = torch.tensor([1.0, 2.0]).sqrt()
    assert float((one * weights).sum()) == float((other * weights).sum())
    candidates = torch.stack([one, other, one]).unsqueeze(1)
    assert usable_candidates(candidates)[:2].all()


@pytest.mark.parametrize("width", [1, D, 64])
def test_of_candidates_equal_but_for_rounding_the_earliest_is_usable(width: int) -> None:
    different = drawn(6, C, width)
    blanks = different[:1] * (1 + 1e-6 * drawn(20, C, width, seed=1))
    candidates = torch.cat([different[1:3], blanks, different[3:]])
    usable = usable_candidates(candidates)
    assert usable[:3].all() and not usable[3:22].any() and usable[22:].all()
    rounded = candidates * (1 + 1e-7 * drawn(25, C, width, seed=2))
    assert torch.equal(usable, usable_candidates(rounded))


def test_rows_that_nobody_filled_take_no_candidate_with_them() -> None:
    candidates = drawn(M, C, D)
    candidates[5] = 1e-7  # offered, and near to no vector but zero
    candidates[[3, 9]] = 0.0
    usable = usable_candidates(candidates)
    assert not usable[[3, 9]].any() and int(usable.sum()) == C * (M - 2)
