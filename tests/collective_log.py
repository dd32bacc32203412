"""The collectives that a test's own code calls: which, of what dtype and shape, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

COLLECTIVES = (
    "all_to_all_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_reduce",
    "all_gather",
    "broadcast",
)


@contextmanager
def logged_collectives() -> Iterator[list[list]]:
    """Yield a list that gets ``[name, dtype, shape]`` of what is sent, one entry per call."""
    calls: list[list] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(torch.distributed, name, _logging(name, calls))
        yield calls


def _logging(name: str, calls: list[list]):  # noqa: ANN202
    real = getattr(torch.distributed, name)
    position = 0 if name in ("all_reduce", "broadcast") else 1  # of the tensor that is sent

    def call(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
        sent = args[position]
        calls.append([name, str(sent.dtype).removeprefix("torch."), list(sent.shape)])
        return real(*args, **kwargs)

    return call


def names_of(calls: list[list]) -> list[str]:
    """The names of logged calls, in their order."""
    return [call[0] for call in calls]
