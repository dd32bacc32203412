"""In-flight microbatches and bubbles against schedules drawn by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from vqmoe_megatron.plan.pipeline_schedule import (
    bubble_microbatches,
    num_warmup_passes,
    peak_in_flight,
)


@pytest.mark.parametrize(("stage", "held"), [(0, 4), (1, 3), (2, 2), (3, 1)])
def test_1f1b_holds_one_microbatch_per_stage_behind(stage: int, held: int) -> None:
    assert peak_in_flight([10], 4, stage, 8) == 10 * held


def test_few_microbatches_are_all_that_can_be_held() -> None:
    assert peak_in_flight([10], 4, 0, 2) == 20
    assert num_warmup_passes(4, 1, 0, 2) == 2


def test_interleaved_by_hand() -> None:
    # PP 2, VPP 2, stage 0, 4 microbatches. Forwards: a a b b a a b b; 2 * 1 + 1 * 2 = 4 ahead;
    # then b of the third microbatch ahead ... backwards b b a a. Held before the first backward:
    # a a b b a, chunk a keeps 1 and b 100.
    assert num_warmup_passes(2, 2, 0, 4) == 4
    # F a a b b | F a B b | F a B b | F b B a | F b B a | ...: 203, 104 after B and F, ...
    assert peak_in_flight([1, 100], 2, 0, 4) == 203
    assert num_warmup_passes(2, 2, 1, 4) == 2
    # stage 1: F a a | F b B b | F b B b | F a B a | ...: never more than a a b
    assert peak_in_flight([1, 100], 2, 1, 4) == 102


def test_bubble_shrinks_with_chunks() -> None:
    assert bubble_microbatches(1, 1) == 0
    assert bubble_microbatches(4, 1) == 3
    assert bubble_microbatches(4, 2) == Fraction(3, 2)
