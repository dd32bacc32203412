"""The codebook module: spaces, lookup gradients, accumulators, one step, what it keeps in fp32."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.codebook import Codebook, build_codebook
from vqmoe_megatron.vq.codebook_update import StepStatistics

HIDDEN = 8


def make(**settings: object) -> Codebook:
    return build_codebook(
        VQConfig(**{"num_codes": 6, "init": "uniform", **settings}), HIDDEN, seed=3
    )


def step(codebook: Codebook, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """One training step on tokens [T, H], as one rank alone would take it."""
    prepared = codebook.prepare(x)
    codebook.record(prepared, codebook.search(prepared), torch.arange(4))
    total = codebook.step_total if codebook.keeps_sums else None
    return codebook.apply_step(
        StepStatistics(codebook.step_count.clone(), total, codebook.step_candidates)
    )


def persistent(codebook: Codebook) -> dict[str, torch.Tensor]:
    skipped = "num_steps"
    return {n: v.clone() for n, v in codebook.state_dict().items() if n != skipped}


@pytest.mark.parametrize(
    ("update", "frozen", "trained"),
    [("gradient", False, True), ("reanchor", False, True), ("ema", False, False)]
    + [(update, True, False) for update in ("gradient", "reanchor", "ema")],
)
def test_only_unfrozen_gradient_codes_require_a_gradient(
    update: str, frozen: bool, trained: bool
) -> None:
    codebook = make(codebook_update=update, freeze_codebook=frozen)
    assert codebook.codes.requires_grad is trained


def test_cosine_tokens_and_codes_have_the_length_of_a_normalised_token() -> None:
    codebook = make(quantizer="cosine")
    x = 100 * torch.randn(20, HIDDEN)
    torch.testing.assert_close(codebook.prepare(x).norm(dim=1), torch.full((20,), HIDDEN**0.5))
    torch.testing.assert_close(codebook.code_vectors().norm(dim=2), torch.full((1, 6), HIDDEN**0.5))
    by_angle = torch.nn.functional.cosine_similarity(x[:, None], codebook.codes[0], dim=2)
    assert torch.equal(codebook.search(codebook.prepare(x))[:, 0], by_angle.argmax(dim=1))


def test_lookup_sends_each_gradient_to_its_own_code() -> None:
    codebook = make(codebook_update="gradient", quantizer="product", num_code_slices=2)
    ids = torch.tensor([[1, 5], [1, 0]])
    vectors = codebook.lookup(ids)
    assert torch.equal(vectors[0], torch.cat([codebook.codes[0, 1], codebook.codes[1, 5]]))
    vectors.sum().backward()
    expected = torch.zeros(2, 6, 4)
    expected[0, 1], expected[1, 5], expected[1, 0] = 2.0, 1.0, 1.0
    assert torch.equal(codebook.codes.grad, expected)


def test_record_adds_microbatches_and_the_candidates_that_they_offer() -> None:
    codebook = make(codebook_update="ema")
    first, second = torch.randn(5, HIDDEN), torch.randn(7, HIDDEN)
    for x, rows in ((first, torch.tensor([0, 2])), (second, None), (second[:0], torch.arange(0))):
        codebook.record(x, codebook.search(x), rows)
    count, total = torch.zeros(6), torch.zeros(6, HIDDEN)
    for x in torch.cat([first, second]):
        k = int(codebook.search(x[None])[0, 0])
        count[k] += 1
        total[k] += x
    assert torch.equal(codebook.step_count[0], count)
    torch.testing.assert_close(codebook.step_total[0], total)
    assert torch.equal(codebook.step_candidates[:, 0], first[[0, 2]])


@pytest.mark.parametrize("update", ["ema", "reanchor", "gradient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_token_leaves_the_codebook_as_it_was(update: str, bad: float) -> None:
    codebook = make(codebook_update=update, dead_code_threshold=0.9)
    step(codebook, torch.randn(30, HIDDEN))
    before = persistent(codebook)
    x = torch.randn(30, HIDDEN)
    x[17, 3] = bad  # not among the candidates, which are the first four
    step(codebook, x)
    for name, value in persistent(codebook).items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(codebook.step_count, torch.zeros(1, 6))  # and the next step starts clean
    step(codebook, torch.randn(30, HIDDEN))
    assert not torch.equal(codebook.usage, before["usage"])


@pytest.mark.parametrize("update", ["ema", "reanchor", "gradient"])
def test_a_frozen_codebook_never_moves_but_is_measured(update: str) -> None:
    codebook = make(codebook_update=update, freeze_codebook=True, dead_code_threshold=0.9)
    before = persistent(codebook)
    metrics = step(codebook, torch.randn(30, HIDDEN))
    for name, value in persistent(codebook).items():
        assert torch.equal(value, before[name]), name
    assert float(metrics["code_perplexity"]) >= 1.0
    assert float(metrics["revived_codes"]) == 0.0


@pytest.mark.parametrize("revival", ["random", "error"])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_codebook_freezes_after_its_steps_and_goes_on_being_measured(
    update: str, revival: str
) -> None:
    """Steps without a token are none; one with a NaN is."""
    settings = {"codebook_update": update, "dead_code_threshold": 0.9, "revival": revival}
    codebook = make(freeze_after_steps=3, **settings)
    free = make(**settings)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(30, HIDDEN, generator=generator) for _ in range(7)]
    tokens[1] = tokens[1][:0]
    tokens[2][5] = math.nan
    frozen, in_use = [], []
    for x in tokens:
        before = persistent(codebook)
        metrics = (take(codebook, x), take(free, x))[0]
        frozen.append(float(metrics["codebook_frozen"]))
        in_use.append(float(metrics["codes_in_use"]))
        has_moved = not torch.equal(codebook.usage, before["usage"])
        assert has_moved is (len(frozen) in (1, 4))  # nothing, and a NaN, move nothing
        if frozen[-1]:
            assert float(metrics["revived_codes"]) == 0.0
            assert float(metrics["assignment_change_rate"]) == 0.0
            for name, value in persistent(codebook).items():
                assert torch.equal(value, before[name]), name
        else:
            for name, value in persistent(free).items():
                assert torch.equal(value, codebook.state_dict()[name]), name
    assert frozen == [0, 0, 0, 0, 1, 1, 1]
    assert int(codebook.num_steps) == 6 and not torch.equal(free.usage, codebook.usage)
    assert in_use[-1] > 1


def take(codebook: Codebook, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """As ``step``, of any number of tokens."""
    rows = torch.arange(4) if len(x) else None
    codebook.record(x, codebook.search(x), rows)
    count, total = codebook.step_count.clone(), codebook.step_total if codebook.keeps_sums else None
    candidates = codebook.step_candidates if len(x) else torch.zeros(4, 1, HIDDEN)
    return codebook.apply_step(StepStatistics(count, total, candidates))


def test_a_frozen_codebook_is_stored_frozen_and_opened_by_the_setting_alone() -> None:
    codebook = make(codebook_update="ema", freeze_after_steps=2)
    for _ in range(3):
        step(codebook, torch.randn(30, HIDDEN))
    for steps, is_frozen in ((2, 1.0), (3, 1.0), (4, 0.0), (None, 0.0)):
        other = make(codebook_update="ema", freeze_after_steps=steps)
        other.load_state_dict(codebook.state_dict())
        before = persistent(other)
        metrics = step(other, torch.randn(30, HIDDEN))
        assert float(metrics["codebook_frozen"]) == is_frozen
        assert torch.equal(other.codes, before["codes"]) is bool(is_frozen)


@pytest.mark.parametrize("update", ["gradient", "reanchor"])
def test_adams_momentum_and_decay_do_not_move_frozen_codes(update: str) -> None:
    codebook = make(codebook_update=update, freeze_after_steps=2, dead_code_threshold=0.0)
    adam = torch.optim.AdamW([codebook.codes], lr=0.1, weight_decay=0.5)
    moved, gradients = [], []
    for _ in range(4):
        x = torch.randn(30, HIDDEN)
        adam.zero_grad()
        (codebook.lookup(codebook.search(x)) - x).square().sum().backward()
        gradients.append(bool(codebook.codes.grad.any()))
        step(codebook, x)
        before = codebook.codes.detach().clone()
        adam.step()
        codebook.put_back_frozen()
        moved.append(not torch.equal(codebook.codes, before))
    assert moved == gradients == [True, True, False, False]
    opened = make(codebook_update=update, freeze_after_steps=9)
    opened.load_state_dict(codebook.state_dict())
    with torch.no_grad():
        opened.codes += 1.0
    put = opened.codes.detach().clone()
    opened.put_back_frozen()
    assert torch.equal(opened.codes, put)


def test_loaded_codes_are_not_put_back_to_those_before() -> None:
    codebook = make(codebook_update="gradient", freeze_after_steps=1)
    for _ in range(2):
        step(codebook, torch.randn(30, HIDDEN))
    other = {name: value + 1 for name, value in persistent(codebook).items() if name == "codes"}
    codebook.load_state_dict(other, strict=False)
    codebook.put_back_frozen()
    assert torch.equal(codebook.codes, other["codes"])


def test_revival_by_error_asks_the_codes_before_the_move() -> None:
    """Half of the candidates lie on a code that then moves away: they are taken last."""
    settings = {"codebook_update": "ema", "ema_decay": 0.1, "dead_code_threshold": 0.8}
    codebook = make(num_codes=4, revival="error", **settings)
    with torch.no_grad():
        codebook.codes.fill_(1.0)
        codebook.codes[0, 1:] += 100.0
    x = torch.ones(9, HIDDEN)
    x[[1, 3], 0] = torch.tensor([7.0, 5.0])  # the first 4 are candidates
    x[4:, 0] = 3.0
    assert float(step(codebook, x)["revived_codes"]) == 3
    assert float(codebook.codes[0, 0, 0]) > 2.0
    assert sorted(codebook.codes[0, 1:3, 0].tolist()) == [5.0, 7.0]
    assert float(codebook.codes[0, 3, 0]) == 1.0


def test_replicas_given_the_same_statistics_stay_bit_equal() -> None:
    one, other = (make(codebook_update="ema", dead_code_threshold=0.9) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randn(30, HIDDEN, generator=generator)
        step(one, x)
        step(other, x)
    for name, value in persistent(one).items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert int(one.num_steps) == 5


def test_ema_training_pulls_codes_onto_the_clusters_of_the_data() -> None:
    codebook = make(codebook_update="ema", ema_decay=0.5, num_codes=4, dead_code_threshold=0.2)
    centres = 10 * torch.eye(HIDDEN)[:4]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        noise = torch.randn(64, HIDDEN, generator=generator)
        cluster = torch.randint(0, 4, (64,), generator=generator)
        metrics = step(codebook, centres[cluster] + 0.1 * noise)
    nearest = torch.cdist(centres, codebook.codes[0]).min(dim=1).values
    assert float(nearest.max()) < 0.2
    assert float(metrics["code_perplexity"]) > 3.5
    assert float(metrics["assignment_change_rate"]) == 0.0


def test_assignment_change_rate_counts_probes_that_changed_their_code() -> None:
    codebook = make(codebook_update="gradient", num_codes=2, dead_code_threshold=0.0)
    with torch.no_grad():
        codebook.codes[0, 0], codebook.codes[0, 1] = 1.0, -1.0
    x = torch.ones(8, HIDDEN)
    x[:2] = -1.0  # two of the four candidates
    assert "assignment_change_rate" not in step(codebook, x)  # nothing to compare with yet
    with torch.no_grad():
        codebook.codes[0, 1] = 3.0  # all tokens now belong to code 0
    assert float(step(codebook, x)["assignment_change_rate"]) == 0.5


def test_codes_and_statistics_stay_fp32_in_a_bf16_model_and_follow_fp64() -> None:
    codebook = make(codebook_update="ema")
    before = persistent(codebook)
    torch.nn.Sequential(codebook).bfloat16()
    for name, value in persistent(codebook).items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert codebook.double().codes.dtype == torch.float64


def test_data_is_needed_once_and_a_loaded_codebook_does_not_ask_again() -> None:
    codebook = make(init="data")
    assert codebook.needs_data_init
    sample = torch.randn(50, HIDDEN)
    codebook.initialize_from(sample)
    assert not codebook.needs_data_init
    rows = {tuple(row) for row in sample.tolist()}
    assert len({tuple(row) for row in codebook.codes[0].tolist()} & rows) == 6
    other = make(init="data")
    other.load_state_dict(codebook.state_dict())
    assert not other.needs_data_init and torch.equal(other.codes, codebook.codes)
    fresh = make(init="data")
    fresh.load_state_dict(make(init="data").state_dict())
    assert fresh.needs_data_init


def test_reseeding_redraws_and_equal_seeds_are_equal() -> None:
    one, other = make(), make()
    assert torch.equal(one.codes, other.codes)
    one.reseed(99)
    assert not torch.equal(one.codes, other.codes)
    other.reseed(99)
    assert torch.equal(one.codes, other.codes)


def test_hidden_size_must_divide_by_slices() -> None:
    with pytest.raises(ValueError, match="8 % 3"):
        make(quantizer="product", num_code_slices=3)
