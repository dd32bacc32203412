"""Actions take turns, preparation is not timed, and the garbage collector comes back."""

from __future__ import annotations

import gc
import time

import pytest

from vqmoe_megatron.bench.timing import Action, time_in_turns


def test_rounds_rotate_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    actions = {name: Action(lambda name=name: order.append(name)) for name in "abc"}
    found = time_in_turns(actions, num_repeats=3, num_warmup=1)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert list(found) == ["a", "b", "c"]


def test_a_sleep_is_measured_and_preparation_is_not() -> None:
    slow = Action(lambda: time.sleep(0.02), prepare=lambda: time.sleep(0.2))
    shared = Action(lambda: time.sleep(0.02), num_parts=4)
    found = time_in_turns({"slow": slow, "shared": shared}, num_repeats=3, num_warmup=0)
    assert found["slow"].p10_ms >= 20.0
    assert found["shared"].p10_ms >= 5.0
    assert found["slow"].p10_ms <= found["slow"].median_ms <= found["slow"].p90_ms
    assert found["slow"].p10_ms < 200.0  # the fastest: a busy machine may delay any one


def test_the_collector_rests_only_while_an_action_runs() -> None:
    states: list[bool] = []

    def fail() -> None:
        states.append(gc.isenabled())
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        time_in_turns({"a": Action(fail)}, num_repeats=3, num_warmup=0)
    assert states == [False]
    assert gc.isenabled()


def test_every_round_is_told_before_it_begins() -> None:
    told: list[str] = []
    time_in_turns({"a": Action(lambda: told.append("a"))}, 3, 1, told.append)
    assert told == [word for turn in range(4) for word in (f"round {turn + 1} of 4", "a")]
