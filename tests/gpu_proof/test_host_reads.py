"""Operations that make the host wait are counted, others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vqmoe_megatron.gpu_proof.host_reads import HostReads

X = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda: X.sum().item(), ["_local_scalar_dense"]),
        (lambda: bool(X[0, 0] > 0), ["_local_scalar_dense"]),
        (lambda: torch.nonzero(X > 2), ["nonzero"]),
        (lambda: X[X > 2], ["index"]),
        (lambda: X.clone().index_put_((X > 2,), torch.tensor(0.0)), ["index_put_"]),
        (lambda: torch.bincount(torch.tensor([1, 2])), ["bincount"]),
        (lambda: X.to("meta"), ["cpu to meta"]),
        (lambda: X[torch.tensor([1, 0])], []),
        (lambda: X.index_select(0, torch.tensor([1])), []),
        (lambda: X.to(torch.bfloat16).clone().copy_(X), []),
        (lambda: torch.where(X > 2, X, 0.0), []),
    ],
)
def test_counted(run: Callable[[], object], names: list[str]) -> None:
    with HostReads() as reads:
        run()
    assert list(reads.counts) == names
