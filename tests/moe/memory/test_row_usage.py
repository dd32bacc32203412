"""Reads of rows: counted once per trained token, whatever the layout, frozen codes or not."""

from __future__ import annotations

import pytest
import torch
from real_model import _batches, _unwrapped, recipe, task_of

from vqmoe_megatron.config import CodeMemoryConfig
from vqmoe_megatron.moe.memory.row_plan import RowPlan
from vqmoe_megatron.moe.memory.row_usage import RowUsage

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
ETP = "expert_tensor_parallel_size"
MEMORY = [
    "model.num_layers=2",
    "code_memory.num_rows=64",
    "code_memory.codes=embedding",
    "code_memory.num_codes=40",
    "code_memory.max_order=2",
    "code_memory.freeze_after_steps=2",
    "code_memory.exchange=rows",
    "code_memory.lr_mult=1.0",
]
MOE_AGAIN = ["model.recompute_granularity=selective", "model.recompute_modules=[moe]"]
HIDDEN = ["code_memory.codes=hidden"]


def plan_of(rows: torch.Tensor, is_known: bool) -> RowPlan:
    """As the planner makes it where rows travel, or as on one rank."""
    if not is_known:
        return RowPlan(rows, is_table=False)
    distinct = rows.unique()
    return RowPlan(rows, False, distinct, (distinct.numel(),), (distinct.numel(),))


def test_counts_and_scalars_by_hand() -> None:
    usage = RowUsage(num_addresses=2, num_rows=100, device=None)
    # Neighbours 2 m and 2 m + 1 belong to row m of either address.
    first = torch.tensor([[0, 1], [0, 2], [3, 1]])
    second = torch.tensor([[0, 199]])
    usage.record(first, plan_of(first, True))
    usage.record(second, plan_of(second, True))
    reads = torch.zeros(2, 100)
    for address, row in [(0, 0), (0, 0), (0, 1), (0, 0), (1, 0), (1, 1), (1, 0), (1, 99)]:
        reads[address, row] += 1
    assert torch.equal(usage.by_address(), reads)
    scalars = usage.apply_parts(iter([part.clone() for part in usage.local_parts()]))
    assert float(scalars["rows_in_use"]) == pytest.approx(5 / 200)
    assert float(scalars["top_percent_reads"]) == pytest.approx(5 / 8)  # two rows of 200
    assert float(scalars["distinct_rows"]) == (4 + 2) / 2
    usage.clear_step()
    third = torch.tensor([[4, 1]])
    usage.record(third, plan_of(third, True))
    assert float(usage.step_reads.sum()) == 2
    scalars = usage.apply_parts(iter([part.clone() for part in usage.local_parts()]))
    assert float(scalars["rows_in_use"]) == pytest.approx(6 / 200)  # since the process began
    assert float(scalars["top_percent_reads"]) == pytest.approx(6 / 10)
    assert float(scalars["distinct_rows"]) == 2


def test_distinct_rows_are_not_told_where_the_plan_does_not_know_them() -> None:
    usage = RowUsage(num_addresses=1, num_rows=4, device=None)
    rows = torch.tensor([[0], [0]])
    usage.record(rows, plan_of(rows, False))
    scalars = usage.apply_parts(iter([part.clone() for part in usage.local_parts()]))
    assert sorted(scalars) == ["rows_in_use", "top_percent_reads"]


def test_counts_keep_fp32_in_a_half_precision_model_and_stay_out_of_checkpoints() -> None:
    usage = RowUsage(num_addresses=1, num_rows=4, device=None).bfloat16()
    rows = torch.zeros(300, 1, dtype=torch.int64)
    for _ in range(3):
        usage.record(rows, plan_of(rows, False))
    assert float(usage.step_reads[0]) == 900  # bf16 would stop at 256
    assert usage.state_dict() == {}


def test_addresses_are_named_in_the_order_of_their_rows() -> None:
    names = CodeMemoryConfig(
        num_rows=4, codes="embedding", max_order=2, num_context_codes=8
    ).address_names
    assert names == ("order 1", "order 2", "context", "context and code")
    assert CodeMemoryConfig(num_rows=4, max_order=1).address_names == ("order 1",)


def train_and_count(overrides: list[str], num_steps: int) -> list[dict]:
    """In a rank: what each step's statistics say of rows, by layer."""
    from vqmoe_megatron.engines.megatron.engine import MegatronEngine
    from vqmoe_megatron.plan.layout import check_layout

    config = recipe([*MEMORY, "train.train_iters=20", *overrides])
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    engine = MegatronEngine.build(config, layout, task_of(config))
    for chunk in engine.model:
        chunk.train()
    num_microbatches = config.train.global_batch_size // config.train.micro_batch_size
    num_replicas = layout.data_parallel_size
    replica = torch.distributed.get_rank() // layout.tensor_model_parallel_size % num_replicas
    found = []
    for step in range(num_steps):
        torch.manual_seed(step)  # the same global batch at every layout
        source = _batches(config)
        batches = [next(source) for _ in range(num_microbatches)][replica::num_replicas]
        engine.step([iter(batches) for _ in engine.model], 0, False)
        for chunk in engine.model:  # an evaluation counts nothing
            chunk.eval()
        if layout.pipeline_model_parallel_size == 1:
            with torch.no_grad():
                batch = batches[0]
                engine.model[0](
                    batch["tokens"], batch["position_ids"], None, labels=batch["labels"]
                )
        for chunk in engine.model:
            chunk.train()
        found.append(
            {
                layer.layer_number: (
                    layer.row_reads,
                    {name: float(value) for name, value in layer.scalars.items()},
                )
                for layer in engine.layers
                if layer.row_reads is not None
            }
        )
    streams = [_unwrapped(chunk).code_stream for chunk in engine.model]
    assert all(float(s.row_usage.step_reads.sum()) == 0 for s in streams if s.row_usage is not None)
    return found


NUM_TOKENS = 8 * 16  # of a global batch
LAYOUTS = {
    "tp2-ep2, the experts' part recomputed": (4, {TP: 2, EP: 2}, MOE_AGAIN),
    "pp2": (2, {PP: 2}, []),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_reads_are_those_of_one_rank(name: str, ranks) -> None:  # noqa: ANN001
    num_ranks, layout, overrides = LAYOUTS[name]
    (one,) = ranks(1).run(train_and_count, [], 3)
    sizes = [f"parallel.{key}={size}" for key, size in layout.items()]
    results = ranks(num_ranks).run(train_and_count, [*overrides, *sizes], 3, layout=layout)
    for step, of_one in enumerate(one):  # codes are frozen before the last
        reads, scalars = of_one[0]
        assert list(of_one) == [0] and reads.shape == (2, 64)
        assert reads.sum(dim=1).tolist() == [NUM_TOKENS, NUM_TOKENS]
        assert 0 < scalars["rows_in_use"] <= 1 and "distinct_rows" not in scalars
        told = [of_rank[step] for of_rank in results if of_rank[step]]
        assert len(told) == (1 if PP in layout else num_ranks)  # the first stage counts
        for of_rank in told:
            theirs, their_scalars = of_rank[0]
            assert torch.equal(theirs, reads)
            for scalar in ("rows_in_use", "top_percent_reads"):
                assert their_scalars[scalar] == pytest.approx(scalars[scalar])
            if EP in layout:
                tokens_per_rank = 16 // 2
                assert 1 <= their_scalars["distinct_rows"] <= 2 * tokens_per_rank


@pytest.mark.distributed
def test_layers_count_their_own_rows_where_codes_are_of_hidden_states(ranks) -> None:  # noqa: ANN001
    layout = {TP: 2, ETP: 2}
    sizes = [f"parallel.{key}={size}" for key, size in layout.items()]
    overrides = [*HIDDEN, *MOE_AGAIN, *sizes]
    for of_rank in ranks(2).run(train_and_count, overrides, 2, layout=layout):
        for step in of_rank:
            assert list(step) == [1, 2]
            for reads, scalars in step.values():
                assert reads.sum(dim=1).tolist() == [NUM_TOKENS, NUM_TOKENS]
                assert {"rows_in_use", "distinct_rows", "code_perplexity"} <= set(scalars)
        assert not torch.equal(of_rank[1][1][0], of_rank[1][2][0])
