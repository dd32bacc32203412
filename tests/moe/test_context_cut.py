"""Which positions a context-parallel rank holds, and how they are put together again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vqmoe_megatron.moe.context_cut import gathered_in_order, in_order, own_part, own_spans


def group(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def test_the_drawn_cut() -> None:
    """P 2, S 8."""
    whole = torch.arange(8)
    assert own_part(whole, group(0, 2), 0).tolist() == [0, 1, 6, 7]
    assert own_part(whole, group(1, 2), 0).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_make_the_whole_again(size: int, dim: int) -> None:
    shape = [3, 3]
    shape[dim] = 24
    whole = torch.randn(*shape, 2)
    parts = [own_part(whole, group(rank, size), dim) for rank in range(size)]
    assert len({part.shape for part in parts}) == 1
    assert torch.equal(in_order(parts, dim), whole)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_spans_are_the_positions_that_a_rank_holds(size: int, num_shards: int) -> None:
    whole = torch.arange(72)
    for rank in range(size):
        for shard in range(num_shards):
            held = own_part(whole, group(rank, size), 0).chunk(num_shards)[shard]
            found = torch.full_like(held, -1)
            for span in own_spans(len(held), group(shard, num_shards), group(rank, size)):
                places = slice(span.place, span.place + span.length)
                found[places] = torch.arange(span.first, span.first + span.length)
            assert torch.equal(found, held)


def cut_and_gathered() -> list[torch.Tensor]:
    """In a rank: this rank's part by our rule and by Megatron's, and the whole it came of."""
    from megatron.core import parallel_state

    from vqmoe_megatron.runtime.versions import batch_on_this_cp_rank

    whole = torch.arange(48).view(2, 24)
    cp = parallel_state.get_context_parallel_group()
    ours = own_part(whole, cp, 1)
    theirs = batch_on_this_cp_rank({"tokens": whole})["tokens"]
    return [ours, theirs, gathered_in_order(ours.t(), cp).t()]


@pytest.mark.distributed
def test_the_cut_is_megatron_s(ranks) -> None:
    results = ranks(2).run(cut_and_gathered, layout={"context_parallel_size": 2})
    for ours, theirs, gathered in results:
        assert torch.equal(ours, theirs)
        assert torch.equal(gathered, torch.arange(48).view(2, 24))
    assert not torch.equal(results[0][0], results[1][0])
