"""Residual codes against loops over tokens and depths, written from their definition."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.codebook import Codebook, build_codebook
from vqmoe_megatron.vq.codebook_update import StepStatistics

HIDDEN, DEPTHS, K, T = 7, 3, 5, 40  # the depths do not divide the width


def make(**settings: object) -> Codebook:
    vq = {"init": "uniform", **settings}
    vq = VQConfig(quantizer="residual", num_codes=K, num_code_slices=DEPTHS, **vq)
    return build_codebook(vq, HIDDEN, seed=3)


def tokens(seed: int = 0, count: int = T) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def walk(x: torch.Tensor, codes: torch.Tensor) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Codes and residuals of every token [H], depth by depth."""
    all_ids, all_left = [], []
    for token in x:
        ids, left = [], [token]
        for of_depth in codes:
            distances = [float((left[-1] - v).square().sum()) for v in of_depth]
            ids.append(distances.index(min(distances)))
            left.append(left[-1] - of_depth[ids[-1]])
        all_ids.append(ids)
        all_left.append(torch.stack(left[:-1]))
    return all_ids, all_left


def test_search_lookup_and_parts_are_those_of_the_loop() -> None:
    codebook, x = make().double(), tokens().double()
    ids, left = walk(x, codebook.codes.detach())
    found = codebook.search(x)
    assert found.tolist() == ids
    torch.testing.assert_close(codebook.parts(x, found), torch.stack(left))
    last = torch.stack([one[-1] for one in left])
    whole = x - last + codebook.codes[-1][found[:, -1]]
    torch.testing.assert_close(codebook.lookup(found), whole)
    assert torch.equal(codebook.search_parts(torch.stack(left)), found)


def test_losses_and_their_gradients_are_sums_over_depths() -> None:
    codebook, x = make(codebook_update="gradient").double(), tokens().double().requires_grad_()
    ids = codebook.search(x)
    commitment, loss = codebook.losses(x, codebook.code_vectors(), ids)
    (0.25 * commitment + loss).backward()
    dx, dv = x.grad.clone(), codebook.codes.grad.clone()
    x.grad = codebook.codes.grad = None
    total = 0.0
    for t, token in enumerate(x):
        left = token
        for c in range(DEPTHS):
            v = codebook.codes[c, ids[t, c]]
            total = total + 0.25 * (left - v.detach()).square().sum()
            total = total + (left.detach() - v).square().sum()
            left = left - v.detach()
    (total / x.numel()).backward()
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dv, codebook.codes.grad)


def take_step(codebook: Codebook, x: torch.Tensor) -> dict[str, torch.Tensor]:
    codebook.record(x, codebook.search(x), torch.arange(10))
    total = codebook.step_total.clone() if codebook.keeps_sums else None
    statistics = StepStatistics(codebook.step_count.clone(), total, codebook.step_candidates)
    return codebook.apply_step(statistics)


def test_an_ema_step_moves_codes_to_the_means_of_their_residuals() -> None:
    codebook, x = make(dead_code_threshold=0.0, ema_decay=0.9), tokens()
    before = codebook.codes.detach().clone()
    ids, left = walk(x, before)
    take_step(codebook, x)
    for c in range(DEPTHS):
        for k in range(K):
            own = [left[t][c] for t in range(T) if ids[t][c] == k]
            usage = 0.9 / K + 0.1 * len(own) / T
            total = 0.9 * before[c, k] / K + 0.1 * sum(own, torch.zeros(HIDDEN)) / T
            torch.testing.assert_close(codebook.codes[c, k].detach(), total / usage)


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("revival", ["random", "error"])
def test_dead_codes_take_residuals_of_their_own_depth(update: str, revival: str) -> None:
    codebook, x = make(codebook_update=update, revival=revival, ema_decay=0.5), tokens(count=10)
    codebook.codes.data[1, 2] += 100.0  # nobody's
    for _ in range(6):
        take_step(codebook, x)
    code = codebook.codes[1, 2].detach()
    assert code.abs().max() < 50
    assert codebook.usage[1, 2] > 0


@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_the_first_data_set_depth_after_depth(init: str) -> None:
    codebook, x = make(init=init), tokens(count=200)
    codebook.initialize_from(x)
    residuals = codebook.parts(x, codebook.search(x))  # [T, C, H]
    if init == "data":  # every code was the residual of a token
        for c in range(DEPTHS):
            for code in codebook.codes[c].detach():
                assert (residuals[:, c] - code).abs().amax(dim=1).min() < 1e-6
    else:  # each depth leaves less than the one before
        errors = residuals.square().mean(dim=(0, 2))
        assert errors[0] > errors[1] > errors[2]
    assert not codebook.needs_data_init


def test_tokens_that_became_codes_start_no_code_at_zero() -> None:
    codebook, x = make(init="data"), tokens(count=2 * K)  # half of them are codes of depth 0
    codebook.initialize_from(x)
    assert codebook.codes.norm(dim=2).min() > 0.1


def test_what_is_left_of_a_token_that_is_its_own_code_is_offered_to_no_dead_code() -> None:
    codebook, x = make(), tokens()
    codebook.codes.data[0, 1] = x[3] * (1 + 2e-7)  # a code as its moving average rounds it
    parts = codebook.parts(x, codebook.search(x))
    assert not parts[3, 1].any() and parts[3, 0].any() and parts[4, 1].any()


def test_one_depth_is_the_euclidean_codebook() -> None:
    one = build_codebook(VQConfig(quantizer="residual", num_codes=K, init="uniform"), HIDDEN, 3)
    plain = build_codebook(VQConfig(num_codes=K, init="uniform"), HIDDEN, 3)
    x = tokens()
    assert torch.equal(one.search(x), plain.search(x))
    for codebook in (one, plain):
        take_step(codebook, x)
    for name, value in plain.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name
