"""An action runs once per trained microbatch: not in evaluation, once under recompute."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from vqmoe_megatron.moe.backward_hook import run_in_backward


def test_runs_once_and_passes_value_and_gradient() -> None:
    calls = []
    x = torch.randn(3, requires_grad=True)
    y = run_in_backward(x, lambda: calls.append(1))
    assert torch.equal(y, x) and calls == []
    (2 * y).sum().backward()
    assert calls == [1]
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_recompute_counts_once() -> None:
    calls = []
    x = torch.randn(3, requires_grad=True)
    for reentrant in (True, False):
        calls.clear()
        checkpoint(
            lambda t: run_in_backward(t * 2, lambda: calls.append(1)), x, use_reentrant=reentrant
        ).sum().backward()
        assert calls == [1]


def test_evaluation_never_runs_it() -> None:
    calls = []
    with torch.no_grad():
        run_in_backward(torch.randn(3, requires_grad=True), lambda: calls.append(1))
    assert calls == []
