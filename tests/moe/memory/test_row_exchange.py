"""Rows travel to their readers and the sums of their gradients home, in both forms."""

from __future__ import annotations

import pytest
import torch
from collective_log import logged_collectives

from vqmoe_megatron.moe.memory.row_plan import RowPlaces

pytestmark = pytest.mark.distributed

EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
LAYOUTS = {"ep4": ({EP: 4}, (4, 1)), "ep2etp2": ({EP: 2, ETP: 2}, (2, 2))}
NUM_ROWS, NUM_TOKENS, WIDTH = 48, 7, 3


def drawn(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All values [R, H] by slot, this rank's row ids [T, A] and weights [T, H] of its output."""
    values = torch.randn(
        NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(2 + rank)
    rows = torch.randint(NUM_ROWS, (NUM_TOKENS, 2), generator=generator)
    if rank == 1:
        rows[:] = 4  # a row that is read many times, and by others
    weights = torch.randn(NUM_TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return values, rows, weights


def read(sizes: list[int], exchange: str, dtype_name: str) -> dict:
    """In a rank: read and differentiate."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from vqmoe_megatron.moe.memory.row_exchange import fetch_rows, read_rows
    from vqmoe_megatron.moe.memory.row_plan import plan_rows, sharing_group

    group, dtype = sharing_group(get_default_pg_collection()), getattr(torch, dtype_name)
    values, rows, weights = drawn(group.rank())
    places = RowPlaces(NUM_ROWS, 4, *sizes)
    own = values.chunk(group.size())[group.rank()].to(dtype).requires_grad_()
    plan = plan_rows(rows, places, exchange, group)
    with logged_collectives() as calls:
        fetched = fetch_rows(own, plan, group)
        output = read_rows(fetched, plan, dtype)
        (output * weights.to(dtype)).sum().backward()
    return {
        "output": output.detach(),
        "gradient": own.grad,
        "calls": [call[:2] for call in calls],
        "fetched": str(fetched.dtype),
    }


@pytest.mark.parametrize("exchange", ["rows", "table"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_values_and_gradients(exchange: str, layout: str, dtype: str, ranks) -> None:  # noqa: ANN001
    sizes, counts = LAYOUTS[layout]
    results = ranks(4).run(read, list(counts), exchange, dtype, layout=sizes)
    kind, tolerance = getattr(torch, dtype), 1e-13 if dtype == "float64" else 2e-2
    values = drawn(0)[0].to(kind).double().requires_grad_()
    places = RowPlaces(NUM_ROWS, 4, *counts)
    for rank, result in enumerate(results):
        _, rows, weights = drawn(rank)
        expected = torch.stack(
            [sum(values[slot] for slot in of_token) for of_token in places.slots(rows).tolist()]
        )
        (expected * weights.to(kind).double()).sum().backward()
        torch.testing.assert_close(
            result["output"].double(), expected.detach(), rtol=tolerance, atol=tolerance
        )
        travel = ["all_to_all_single"] * 2
        if exchange == "table":
            travel = ["all_gather_into_tensor", "reduce_scatter_tensor"]
        back = "float64" if dtype == "float64" else "float32"  # gradients go home in fp32
        assert result["calls"] == [[travel[0], dtype], [travel[1], back]]
        assert result["fetched"] == f"torch.{back}"
    gradient = torch.cat([result["gradient"] for result in results])
    assert gradient.dtype == kind
    torch.testing.assert_close(gradient.double(), values.grad, rtol=tolerance, atol=tolerance)


def read_alone() -> list:
    """In the only rank: nothing is sent."""
    return read([1, 1], "rows", "float64")["calls"]


def test_one_rank_sends_nothing(ranks) -> None:  # noqa: ANN001
    assert ranks(1).run(read_alone) == [[]]
