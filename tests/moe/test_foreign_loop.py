"""Codebooks move exactly once per optimizer step in loops that never heard of them, or say so."""

from __future__ import annotations

import copy

import foreign_loops as loops
import pytest
import torch

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}


@pytest.mark.parametrize("is_recomputed", [False, True])
@pytest.mark.parametrize("update", ["ema", "gradient", "reanchor"])
@pytest.mark.parametrize(("num_ranks", "layout"), [(1, {}), (2, EP2)], ids=["1", "ep2"])
def test_a_hand_written_loop_moves_them_once_per_step(
    ranks, num_ranks, layout, update, is_recomputed
) -> None:
    results = ranks(num_ranks).run(
        loops.plain_torch, {"codebook_update": update}, 4, 3, is_recomputed, layout=layout
    )
    for rank in results:
        assert rank["steps"] == 4
        assert rank["tokens"] == [3 * 12.0] * 4  # gathered anew in every step, recomputed or not
        if update == "ema":
            for before, after in zip(rank["codes"], rank["codes"][1:], strict=False):
                assert not torch.equal(before, after)
        if update == "ema":  # others follow each rank's own optimizer here, without DDP
            for ours, first in zip(rank["codes"], results[0]["codes"], strict=True):
                assert torch.equal(ours, first)


def test_several_optimizers_are_one_step(ranks) -> None:
    assert ranks(1).run(loops.two_optimizers, 3) == [3]


@pytest.mark.parametrize("how", ["data", "in place"])
def test_weights_moved_by_hand_are_noticed_at_the_second_step(ranks, how) -> None:
    (told,) = ranks(1).run(loops.by_hand, how)
    assert len(told) == 2
    assert told[0] == ""
    assert "synchronize_codebooks(model) once per step" in told[1]


def test_the_advice_helps(ranks) -> None:
    assert ranks(1).run(loops.by_hand_with_a_call, 3) == [3]


def test_a_kept_table_without_a_schedule_stops_before_the_weights_move(ranks) -> None:
    ((text, is_unmoved),) = ranks(1).run(loops.table_without_a_schedule)
    assert "vq.table_per_step needs a training schedule" in text
    assert is_unmoved


def test_a_kept_table_is_refused_where_gradients_leave_early(ranks) -> None:
    (text,) = ranks(1).run(loops.early_reduction)
    assert "vq.table_per_step with overlap_grad_reduce" in text


HOOKS = ["finalize", "partial", "none", "sync", "sync in a function"]


@pytest.mark.parametrize("table_per_step", [False, True], ids=["", "table"])
def test_whatever_the_finalise_function_is(ranks, table_per_step) -> None:
    """The hook is overwritten before every step; gradients and codes are those of CodebookSync."""
    settings = {"table_per_step": table_per_step}
    found = {
        hook: ranks(2).run(loops.with_megatrons_schedule, settings, hook, [False] * 3, layout=EP2)
        for hook in HOOKS
    }
    for hook, results in found.items():
        for rank, expected in zip(results, found["sync"], strict=True):
            assert [steps for steps, _ in rank["states"]] == [1, 2, 3], hook
            assert torch.equal(rank["codes"], expected["codes"]), hook
            for ours, theirs in zip(rank["grads"], expected["grads"], strict=True):
                assert torch.equal(ours, theirs), hook


def test_a_kept_table_has_the_gradients_of_none(ranks) -> None:
    one = ranks(1).run(loops.with_megatrons_schedule, {}, "finalize", [False] * 2)[0]
    two = ranks(1).run(
        loops.with_megatrons_schedule, {"table_per_step": True}, "finalize", [False] * 2
    )[0]
    for ours, theirs in zip(one["grads"], two["grads"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_skipped_step_moves_nothing_and_leaves_nothing(ranks) -> None:
    pattern = [False, True, True, False]
    (skipping,) = ranks(1).run(loops.with_megatrons_schedule, {}, "finalize", pattern)
    assert [steps for steps, _ in skipping["states"]] == [1, 1, 1, 2]
    for _, usage in skipping["states"]:
        assert usage == pytest.approx(1.0, abs=1e-5)  # still shares of one step's tokens


@pytest.mark.parametrize("way", ["data", "between"])
def test_a_schedule_without_an_optimizer_of_torch(ranks, way) -> None:
    """Weights moved by hand are noticed; a look at the model before the optimizer costs nothing."""
    (found,) = ranks(1).run(loops.schedule_and_then, way)
    if way == "data":
        assert found[:1] == [1] or "synchronize_codebooks" in str(found[-1])
        assert "no optimizer of torch that holds them was about to step" in found[-1]
        assert len(found) == 2
    else:
        assert found == [1, 2, 3]


@pytest.mark.parametrize("config", ["shared", "own"])
@pytest.mark.parametrize("schedule", [False, True], ids=["by hand", "schedule"])
def test_two_models_in_turn(ranks, config, schedule) -> None:
    """Each moves with its own optimizer, also where both were differentiated before."""
    (found,) = ranks(1).run(loops.two_models, config == "shared", schedule)
    assert found == [[1, 0], [1, 1], [2, 1], [2, 2]]


def test_layers_of_one_model_step_at_their_own_rates(ranks) -> None:
    assert ranks(1).run(loops.two_rates) == [[8, 2]]


def test_weights_moved_by_hand_later_on_are_noticed_too(ranks) -> None:
    (told,) = ranks(1).run(loops.by_hand_after_a_step)
    assert told[:2] == ["", ""]
    assert "synchronize_codebooks(model) once per step" in told[2]


def test_a_closure_is_refused_at_the_second_step(ranks) -> None:
    ((told, is_unmoved),) = ranks(1).run(loops.with_a_closure, "SGD")
    assert "without a closure" in told
    assert is_unmoved
    ((told, _),) = ranks(1).run(loops.with_a_closure, "LBFGS")  # moves weights in its first step
    assert "in a closure, is too late" in told


def test_autocast_is_refused_by_name(ranks) -> None:
    (told,) = ranks(1).run(loops.under_autocast)
    assert "torch.autocast" in told and "bf16=True" in told


def test_anothers_optimizer_moves_nothing(ranks) -> None:
    (found,) = ranks(1).run(loops.stranger, "parameter")
    assert found == [0, 1]
    (found,) = ranks(1).run(loops.stranger, "tensor")
    assert found == [0, 1]


def test_a_layer_that_no_gradient_passes_keeps_its_codes(ranks) -> None:
    """Its siblings move; it takes part in their reduction and is left as it is."""
    for frozen, moving in ranks(2).run(loops.frozen_below, layout=EP2):
        assert frozen == [0, True]
        assert moving[0] == 12 and not moving[1]


def test_a_rank_without_tokens_for_a_layer_takes_part(ranks) -> None:
    results = ranks(2).run(loops.unused_on_one_rank, timeout_seconds=60)
    assert results[0] == results[1] == [1, 2, 3]


@pytest.mark.parametrize("in_router", [False, True], ids=["layer", "router"])
@pytest.mark.parametrize(
    ("update", "is_frozen", "is_refused"),
    [
        ("gradient", False, True),
        ("reanchor", False, True),
        ("gradient", True, False),
        ("ema", False, False),
    ],
)
def test_trained_codes_among_half_weights_are_refused(
    ranks, update, is_frozen, is_refused, in_router
) -> None:
    (text,) = ranks(1).run(loops.half_precision, update, is_frozen, in_router)
    assert ("use vq.codebook_update=ema" in text) == is_refused, text


def test_a_copied_configuration_takes_nothing_along() -> None:
    from vqmoe_megatron.moe import CodebookSync

    sync = CodebookSync(applies_at_once=False, finalize=None)
    sync._owners = [object()]
    copied = copy.deepcopy(sync)
    assert (copied.applies_at_once, copied.finalize, copied._owners) == (False, None, [])
