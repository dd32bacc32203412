"""The host follows a counter on the device one step later, and knows when it must ask."""

from __future__ import annotations

import copy
import pickle

import torch

from vqmoe_megatron.runtime.cpu_compat.meta_device import answered_reads
from vqmoe_megatron.runtime.device_purity import DevicePurity
from vqmoe_megatron.vq.host_draws import StepsTaken, on_device


def test_the_count_is_that_of_the_last_follow() -> None:
    counter, steps = torch.tensor(0), StepsTaken()
    for number in range(4):
        assert steps.read(counter) == number
        counter += 1
        steps.follow(counter)


def test_a_counter_written_otherwise_or_replaced_is_read_anew() -> None:
    counter, steps = torch.tensor(3), StepsTaken()
    steps.follow(counter)
    counter.fill_(7)  # as a load does
    assert steps.read(counter) == 7
    steps.follow(counter)
    assert steps.read(torch.tensor(9)) == 9  # as a move to another device does


def test_copies_and_stored_ones_begin_anew() -> None:
    counter, steps = torch.tensor(3), StepsTaken()
    steps.follow(counter)
    for other in (copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))):
        assert other._counter is None and other.read(torch.tensor(5)) == 5


def test_only_a_counter_that_is_not_followed_holds_up_the_host() -> None:
    counter, steps = torch.zeros((), dtype=torch.int64, device="meta"), StepsTaken()
    with answered_reads():
        with DevicePurity("meta") as first:
            steps.read(counter)
        with DevicePurity("meta") as later:
            steps.follow(counter)
            steps.read(counter)
    assert [one.kind for one in first.seen] == ["host read"] and later.seen == []


def test_a_host_draw_stays_where_it_is_on_the_host() -> None:
    drawn = torch.randperm(5)
    assert on_device(drawn, torch.device("cpu")) is drawn
