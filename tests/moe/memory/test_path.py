"""A layer with code memory equals the oracle in fp64: output and every gradient, by name."""

from __future__ import annotations

import pytest
import torch
from collective_log import logged_collectives, names_of
from fast_tier import spread, tiered
from memory_layer import (
    HIDDEN,
    VOCABULARY,
    build_memory_layer,
    evaluate_memory_layer,
    expected,
    gathered,
)

pytestmark = pytest.mark.distributed

TP, EP, ETP, CP = (
    f"{name}_parallel_size" for name in ("tensor_model", "expert_model", "expert_tensor", "context")
)
LAYOUTS = {
    "ep4": (4, {EP: 4}),  # one sequence at a time
    "tp2ep2": (4, {TP: 2, EP: 2}),
    "etp2": (2, {ETP: 2}),
    "1rank": (1, {}),
    "tp2ep2etp2": (4, {TP: 2, EP: 2, ETP: 2}),
    "ep2": (4, {EP: 2}),  # and two replicas of every row
    "tp2": (2, {TP: 2}),
    "cp2": (2, {CP: 2}),
    "tp2cp2ep2": (4, {TP: 2, CP: 2, EP: 2}),
    "cp2ep4": (4, {CP: 2, EP: 4}),
}
CONTEXTS = {"num_context_codes": 6, "context_decay": 0.6}
CASES = {
    "rows": {"memory": {"exchange": "rows"}},
    "table": {"memory": {"exchange": "table"}},
    "auto": {},
    "tokens": {"memory": {"codes": "tokens", "num_codes": 256, "exchange": "rows"}},
    "random": {"memory": {"codes": "random"}},
    "frozen-random": {"memory": {"codes": "frozen_random", "exchange": "rows"}},
    "hidden-rows": {"memory": {"codes": "hidden", "exchange": "rows"}},
    "hidden-table": {"memory": {"codes": "hidden", "exchange": "table"}},
    "hidden-recompute": {"memory": {"codes": "hidden", "exchange": "rows"}, "recompute": True},
    "order-1": {"memory": {"max_order": 1, "exchange": "rows"}},
    "order-8": {"memory": {"max_order": 8, "exchange": "rows"}},  # as long as a sequence
    "contexts-rows": {"memory": {**CONTEXTS, "exchange": "rows"}},
    "contexts-table": {"memory": {**CONTEXTS, "exchange": "table"}},
    "gate": {"memory": {"gate": "token", "exchange": "rows"}},
    "one-code": {"memory": {"exchange": "rows"}, "tokens": "one code"},
    # a single row of a single owner: the others are asked for nothing
    "one-row": {"memory": {"exchange": "rows", "max_order": 1}, "tokens": "one code"},
    "recompute": {"memory": {"exchange": "rows"}, "recompute": True},
    "recompute-table-gate": {"memory": {"gate": "token", "exchange": "table"}, "recompute": True},
    "dual": {"vq": {"path": "dual"}, "memory": {"exchange": "rows"}},
    "discrete": {"vq": {"path": "discrete"}, "memory": {"exchange": "rows"}},
    "discrete-hidden": {"vq": {"path": "discrete"}, "memory": {"codes": "hidden"}},
    "table-per-step": {
        "vq": {"path": "dual", "execution": "code_space", "table_per_step": True},
        "memory": {"exchange": "rows"},
    },
}
# A row is its expert's output, so these need whole experts.
EXPERT_CASES = {
    "experts-rows": {"memory": {"values": "experts", "exchange": "rows"}},
    "experts-table": {"memory": {"values": "experts", "exchange": "table"}},
    "experts-gate-recompute": {
        "memory": {"values": "experts", "gate": "token", **CONTEXTS},
        "recompute": True,
    },
}
WHOLE_EXPERTS = [name for name in LAYOUTS if "etp" not in name]


def check(case: dict, layout: str, ranks) -> tuple[list[dict], list[list[int]]]:  # noqa: ANN001
    num_ranks, sizes = LAYOUTS[layout]
    results = ranks(num_ranks).run(evaluate_memory_layer, case, layout=sizes)
    found = gathered(results)
    dp_size = results[0]["place"][1]
    theirs, rows = expected(case, results[0]["trained"], results[0]["code_of_token"], dp_size)
    assert set(found) == {name for name, value in theirs.items() if value is not None}
    assert "code_memory.weight" in found
    for name, value in found.items():
        scale = max(1.0, float(theirs[name].abs().max()))
        error = float((value - theirs[name]).abs().max()) / scale
        assert error < 1e-12, f"{name} differs by {error:.3g} (relative)"
    assert bool(found["code_memory.weight"].any())
    return results, rows


@pytest.mark.parametrize(
    ("name", "layout"),
    tiered([(n, layout) for layout in LAYOUTS for n in CASES], spread(CASES, LAYOUTS)),
)
def test_equals_the_oracle(name: str, layout: str, ranks) -> None:  # noqa: ANN001
    results, rows = check(CASES[name], layout, ranks)
    exchange = CASES[name].get("memory", {}).get("exchange")
    plans = [plan for r in results for plan in r["plans"] if plan]
    if exchange is not None and "ep" in layout and plans:
        assert {plan[0] for plan in plans} == {exchange == "table"}
    if name == "one-row":
        assert len({row for read in rows for row in read}) == 1


def read_of_unequal_lengths() -> bool:
    """In a rank: a pass over 300 tokens or 16; whether the whole table was gathered for it."""
    case = {"memory": {"exchange": "auto", "codes": "tokens", "num_codes": 256}}
    layer, stream = build_memory_layer(case, variable_seq_lengths=True)
    length = 300 if torch.distributed.get_rank() == 0 else 16
    tokens = torch.randint(VOCABULARY, (1, length))
    stream.begin(tokens, torch.zeros(1, length, dtype=torch.bool))
    x = torch.randn(length, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
    output, _ = layer(x)
    stream.follow_output(output)
    output.sum().backward()
    return stream.microbatches.current.plan.is_table


def test_ranks_of_unequal_lengths_choose_the_same_exchange(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2}
    assert ranks(2).run(read_of_unequal_lengths, layout=layout) == [False, False]


def fetched_ahead() -> list[list[int]]:
    """In a rank: all-to-alls of :meth:`start_ahead` and of the pass behind it, with and without."""
    counts = []
    for is_started in (True, False):
        layer, stream = build_memory_layer({"memory": {"exchange": "rows"}})
        tokens = torch.randint(VOCABULARY, (2, 4))
        stream.begin(tokens, torch.zeros(2, 4, dtype=torch.bool))
        with logged_collectives() as before:
            layer.start_ahead(rows=is_started)
        with logged_collectives() as inside:
            layer(torch.randn(4, 2, HIDDEN, dtype=torch.float64))
        counts.append([len(names_of(calls)) for calls in (before, inside)])
    return counts


def test_who_fetches_the_rows(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2}
    for (ahead, later), (none, all_of_it) in ranks(2).run(fetched_ahead, layout=layout):
        assert ahead > 0 and none == 0
        assert ahead + later == all_of_it


@pytest.mark.parametrize(
    ("name", "layout"),
    tiered(
        [(n, layout) for layout in WHOLE_EXPERTS for n in EXPERT_CASES],
        spread(EXPERT_CASES, WHOLE_EXPERTS),
    ),
)
def test_rows_that_experts_make_equal_the_oracle(name: str, layout: str, ranks) -> None:  # noqa: ANN001
    results, _ = check(EXPERT_CASES[name], layout, ranks)
    assert all(torch.isfinite(r["gradients"]["experts.weight1"]).all() for r in results)
