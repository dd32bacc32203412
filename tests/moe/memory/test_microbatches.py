"""A layer that is evaluated again in the backward pass works on its own microbatch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vqmoe_megatron.moe.memory.microbatches import Microbatches, is_in_backward


class Chunk:
    """A chunk of two recomputed layers that note which microbatch they saw."""

    def __init__(self, use_reentrant: bool = True) -> None:
        self.microbatches: Microbatches[str] = Microbatches()
        self.seen: list[tuple[bool, str | None]] = []
        self.use_reentrant = use_reentrant

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((is_in_backward(), self.microbatches.current))
        return x.sin()

    def __call__(self, name: str) -> torch.Tensor:
        x = torch.ones(3, requires_grad=True)
        self.microbatches.begin(name)
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=self.use_reentrant)
        self.microbatches.follow(x)
        return x.sum()

    def recomputed(self) -> list[str | None]:
        return [name for again, name in self.seen if again]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=["pipeline", "any order"])
def test_several_under_way(use_reentrant: bool, order: list[int]) -> None:
    chunk = Chunk(use_reentrant)
    losses = [chunk(name) for name in "abc"]
    assert [name for _, name in chunk.seen] == list("aabbcc")
    for number in order:
        losses[number].backward()
    assert chunk.recomputed() == [name for number in order for name in 2 * "abc"[number]]


def test_between_forward_passes_it_is_the_latest_again() -> None:
    chunk = Chunk()
    first, second = chunk("a"), chunk("b")
    first.backward()
    assert chunk.microbatches.current == "b"
    third = chunk("c")
    assert chunk.seen[-1] == (False, "c")
    second.backward()
    third.backward()
    assert chunk.recomputed() == list("aabbcc")


def test_passes_that_are_never_differentiated_shift_nothing() -> None:
    """Megatron's decoder gives outputs that require gradients even where none are kept."""
    chunk = Chunk()
    with torch.no_grad():
        chunk.microbatches.begin("evaluated")
        chunk.microbatches.follow(torch.zeros(3, requires_grad=True))
    dropped, kept = chunk("dropped"), chunk("kept")
    kept.backward()
    assert chunk.recomputed() == ["kept", "kept"]
    del dropped


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_whole_model_that_is_recomputed(use_reentrant: bool) -> None:
    """Its user's checkpoint begins the microbatch again, within the backward pass."""
    chunk = Chunk(use_reentrant)

    def whole(x: torch.Tensor, name: str) -> torch.Tensor:
        chunk.microbatches.begin(name)
        x = chunk.layer(x)
        chunk.microbatches.follow(x)
        return x

    losses = [
        checkpoint(whole, torch.ones(3, requires_grad=True), name, use_reentrant=use_reentrant)
        for name in "ab"
    ]
    for loss in losses:
        loss.sum().backward()
    assert chunk.seen == [(False, "a"), (False, "b"), (True, "a"), (True, "b")]
    assert chunk.microbatches.current == "b"


def test_cleared() -> None:
    chunk = Chunk()
    chunk("a").backward()
    chunk.microbatches.clear()
    assert chunk.microbatches.current is None
    late = chunk("b")
    chunk.microbatches.clear()
    late.backward()
    assert chunk.recomputed() == ["a", "a", "b", "b"]


def test_outside_of_a_backward_pass() -> None:
    assert not is_in_backward()
