"""torch's Adam fused, here its kernel for the CPU, against its plain loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_run import TINY, run_on, train_here

from vqmoe_megatron.engines.megatron.fused_adam import fuse_adams, step_counter, torch_adams

EP2 = {"expert_model_parallel_size": 2}
SHORT = [*TINY, "train.train_iters=8"]


def megatron_optimizer(*inner: torch.optim.Optimizer) -> SimpleNamespace:
    """What of Megatron's chain is looked at."""
    return SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=one) for one in inner])


def test_meta_tensors_and_other_optimizers_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    adam, sgd = torch.optim.AdamW([weight]), torch.optim.SGD([weight])
    chain = megatron_optimizer(adam, sgd)
    assert list(torch_adams(chain)) == [adam]
    fuse_adams(chain, "meta")
    assert not adam.param_groups[0]["fused"]
    fuse_adams(chain, "cpu")
    assert adam.param_groups[0]["fused"] is True and not sgd.param_groups[0].get("fused")


def test_a_fused_groups_counter_lies_beside_its_parameter() -> None:
    parameter = torch.empty(2, device="meta")
    for group, device in (({"fused": True}, "meta"), ({"fused": None}, "cpu"), ({}, "cpu")):
        counter = step_counter(3.0, parameter, group)
        assert (counter.device.type, counter.dtype) == (device, torch.float32)


def train_looped(recipe: str, overrides: list[str]) -> dict:
    """In a rank: a run of the trainer whose Adams are torch's plain loops."""
    from unittest import mock

    from vqmoe_megatron.engines.megatron import optimizer

    def looped(built: object, _: str) -> None:
        assert not any(g["fused"] for adam in torch_adams(built) for g in adam.param_groups)

    with mock.patch.object(optimizer, "fuse_adams", looped):
        return train_here(recipe, overrides)


class Looped:
    """A pool whose Adams are not fused."""

    def __init__(self, pool) -> None:  # noqa: ANN001
        self.pool = pool

    def run(self, _, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN201
        return self.pool.run(train_looped, *args, **kwargs)


def curve(results: list[dict]) -> dict[int, float]:
    """Loss of rank 0 by iteration."""
    return {record["iteration"]: record["loss"] for record in results[0]["records"]}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="plain"),
        pytest.param(["optimizer.use_distributed_optimizer=true"], id="distributed"),
        pytest.param(
            ["optimizer.use_distributed_optimizer=true", "model.bf16=true"], id="distributed-bf16"
        ),
    ],
)
def test_fused_runs_are_those_of_the_loop_and_resume_bitwise(
    overrides,  # noqa: ANN001
    ranks,  # noqa: ANN001
    small_corpus,  # noqa: ANN001
    tmp_path,  # noqa: ANN001
) -> None:
    every, pool = [*SHORT, *overrides], ranks(2)
    plain = curve(run_on(Looped(pool), small_corpus, tmp_path / "plain", every, EP2))
    whole = curve(run_on(pool, small_corpus, tmp_path / "whole", every, EP2))
    cut = [*every, "train.exit_interval=4"]
    first = curve(run_on(pool, small_corpus, tmp_path / "cut", cut, EP2))
    second = curve(run_on(pool, small_corpus, tmp_path / "cut", every, EP2))
    assert first | second == whole and len(first) == 4
    tolerance = 2e-2 if "model.bf16=true" in overrides else 1e-5
    assert whole == pytest.approx(plain, rel=tolerance)
