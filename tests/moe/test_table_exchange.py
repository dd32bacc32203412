"""The table's two collectives on real ranks: values and gradients against one rank that has all.

P = 4 ranks hold S = 3 rows of width H = 2 each; every rank weighs all rows by weights of its own.
"""

from __future__ import annotations

import pytest
import torch
from collective_log import logged_collectives

pytestmark = pytest.mark.distributed

EP4 = {"expert_model_parallel_size": 4}
ETP4 = {"expert_tensor_parallel_size": 4}
NUM_ROWS, WIDTH = 3, 2


def drawn(num_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [P, S, H] and the weights of each rank for all rows, [P, P * S, H]; fp64."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(num_ranks, NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.randn(
        num_ranks, num_ranks * NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64
    )
    return rows, weights


def gather(dtype_name: str, weight_of_rank: list[float] | None) -> dict:
    """In a rank: gather this rank's rows, weigh the table, differentiate."""
    from megatron.core import parallel_state

    from vqmoe_megatron.moe.table_exchange import gather_table

    group = parallel_state.get_expert_model_parallel_group()
    dtype = getattr(torch, dtype_name)
    rows, weights = drawn(group.size())
    own = rows[group.rank()].to(dtype).requires_grad_()
    with logged_collectives() as calls:
        table = gather_table(own, group)
        weight = weights[group.rank()].to(table.dtype)
        if weight_of_rank is not None:
            weight = torch.full_like(weight, weight_of_rank[group.rank()])
        (table * weight).sum().backward()
    return {"table": table.detach(), "gradient": own.grad, "calls": calls}


def test_the_table_is_the_concatenation_and_gradients_sum_over_ranks(ranks) -> None:  # noqa: ANN001
    rows, weights = drawn(4)
    whole = rows.flatten(0, 1).requires_grad_()
    sum((whole * weight).sum() for weight in weights).backward()
    for rank, found in enumerate(ranks(4).run(gather, "float64", None, layout=EP4)):
        assert torch.equal(found["table"], whole.detach())
        expected = whole.grad.view(4, NUM_ROWS, WIDTH)[rank]
        torch.testing.assert_close(found["gradient"], expected, rtol=1e-14, atol=1e-14)
        assert found["calls"] == [
            ["all_gather_into_tensor", "float64", [NUM_ROWS, WIDTH]],
            ["reduce_scatter_tensor", "float64", [4 * NUM_ROWS, WIDTH]],
        ]


def test_a_bf16_table_travels_in_bf16_and_its_gradient_in_fp32(ranks) -> None:  # noqa: ANN001
    weights = [256.0, 1.0, 1.0, 1.0]  # 259 -> 260 in bf16; added up in bf16 it would stay 256
    rows, _ = drawn(4)
    for rank, found in enumerate(ranks(4).run(gather, "bfloat16", weights, layout=EP4)):
        assert found["table"].dtype == torch.float32
        assert torch.equal(found["table"], rows.flatten(0, 1).bfloat16().float())
        assert [call[:2] for call in found["calls"]] == [
            ["all_gather_into_tensor", "bfloat16"],
            ["reduce_scatter_tensor", "float32"],
        ], rank
        expected = torch.full((NUM_ROWS, WIDTH), sum(weights)).bfloat16()
        assert torch.equal(found["gradient"], expected)


@pytest.mark.parametrize(
    ("dtype", "of_table"),
    [("bfloat16", torch.float32), ("float32", torch.float32), ("float64", torch.float64)],
)
def test_one_rank_sends_nothing(ranks, dtype: str, of_table: torch.dtype) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(gather, dtype, None)
    rows, weights = drawn(1)
    rows, weights = rows[0].to(getattr(torch, dtype)), weights[0].to(of_table)
    assert found["calls"] == []
    assert torch.equal(found["table"], rows.to(of_table))
    assert torch.equal(found["gradient"], weights.to(rows.dtype))


def sum_shards() -> dict:
    from megatron.core import parallel_state

    from vqmoe_megatron.moe.table_exchange import sum_over_shards

    group = parallel_state.get_expert_tensor_parallel_group()
    rows, weights = drawn(group.size())
    own = rows[group.rank()].clone().requires_grad_()
    with logged_collectives() as calls:
        total = sum_over_shards(own, group)
        (total * weights[group.rank(), :NUM_ROWS]).sum().backward()
    return {
        "total": total.detach(),
        "gradient": own.grad,
        "own": own.detach(),
        "calls": [name for name, *_ in calls],
    }


def test_shards_sum_to_all_and_gradients_of_all_ranks_tokens_sum(ranks) -> None:  # noqa: ANN001
    rows, weights = drawn(4)
    for rank, found in enumerate(ranks(4).run(sum_shards, layout=ETP4)):
        torch.testing.assert_close(found["total"], rows.sum(dim=0), rtol=1e-14, atol=1e-14)
        expected = weights[:, :NUM_ROWS].sum(dim=0)
        torch.testing.assert_close(found["gradient"], expected, rtol=1e-14, atol=1e-14)
        assert torch.equal(found["own"], rows[rank])  # not summed in place
        assert found["calls"] == ["all_reduce", "all_reduce"]


def test_one_shard_sends_nothing(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(sum_shards)
    assert found["calls"] == []
    assert torch.equal(found["total"], found["own"])
