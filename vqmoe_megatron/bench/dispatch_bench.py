"""``vqmoe bench dispatch``: from hidden states to rows sorted by expert, without any expert.

T tokens, H hidden size, K codes, N experts. At one rank, so no communication is in it. Arms:

    A       Megatron: route (router GEMM, softmax, top-1, [T, N] map), then dispatch_preprocess
            (counts from the map, permutation)
    A-plan  Megatron's dispatch_preprocess alone, on a map made before
    C       ours: nearest-code search, code map, plan (sort, counts), permutation
    C-plan  ours: plan and permutation alone, on experts found before

A and C do the whole way of one token to its expert; with K = N both compare it with as many
vectors. Megatron's half and ours both call the layers' own functions. Before anything is timed,
both must bring the same tokens to the same experts in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from vqmoe_megatron.bench.arm_table import ARMS, FORWARD
from vqmoe_megatron.bench.arms import build_arms
from vqmoe_megatron.bench.cases import GateFailed, LayerCase
from vqmoe_megatron.bench.gate import check_routing
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.shared_inputs import case_inputs
from vqmoe_megatron.bench.timing import Action, time_in_turns
from vqmoe_megatron.moe.dispatch import dispatch
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.vq.permutation import plan_permutation

TEXTS = {
    "A": "Megatron: route, counts, permutation",
    "A-plan": "Megatron: counts, permutation",
    "C": "ours: search, plan, permutation",
    "C-plan": "ours: plan, permutation",
}


def measure_dispatch(
    case: LayerCase, num_repeats: int, num_warmup: int, progress: Progress
) -> list[dict[str, Any]]:
    """Gate and time the four arms; one row each.

    Raises:
        GateFailed: when the sorted rows or their counts differ.

    Needs the process groups of one rank. No communication.
    """
    inputs = case_inputs(case)
    check_routing(inputs)
    arms = build_arms({letter: ARMS[letter] for letter in ("A", "C")}, inputs)
    for arm in arms.values():
        arm.enter(FORWARD)
    actions = _actions(arms["A"].module, arms["C"].module, inputs.x)
    _check(actions)
    what = f"N={case.num_experts} K={case.num_codes} {case.routing}"
    progress.say(f"{what}: both sort the same rows")
    runs = {name: Action(run) for name, run in actions.items()}
    found = time_in_turns(
        runs, num_repeats, num_warmup, lambda turn: progress.look(f"{what}, {turn}")
    )
    return [case.row(name, TEXTS[name], FORWARD) | t.row_fields for name, t in found.items()]


Sorted = tuple[torch.Tensor, torch.Tensor]  # rows [T, H] by expert, rows per expert [N]


def _actions(
    megatron: MoELayer, ours: VQMoELayer, x: torch.Tensor
) -> dict[str, Callable[[], Sorted]]:
    flat = x.flatten(0, 1)

    def route() -> tuple[torch.Tensor, torch.Tensor]:
        probs, routing_map = megatron.route(x)
        return routing_map, probs

    def plan_route(routing_map: torch.Tensor, probs: torch.Tensor) -> Sorted:
        rows, _ = megatron.token_dispatcher.dispatch_preprocess(x, routing_map, probs)
        return rows, megatron.token_dispatcher.tokens_per_expert

    def search() -> torch.Tensor:
        return ours.assigner(flat).experts.flatten()

    def plan_experts(experts: torch.Tensor) -> Sorted:
        plan = plan_permutation(experts, ours.config.num_moe_experts)
        rows, receipt = dispatch(flat, plan, ours.ep_group, ours.expt_tp_group)
        return rows, receipt.tokens_per_local_expert

    with torch.no_grad():
        routed, found = route(), search()
    actions = {
        "A": lambda: plan_route(*route()),
        "A-plan": lambda: plan_route(*routed),
        "C": lambda: plan_experts(search()),
        "C-plan": lambda: plan_experts(found),
    }
    return {name: torch.no_grad()(action) for name, action in actions.items()}


def _check(actions: dict[str, Callable[[], Sorted]]) -> None:
    expected_rows, expected_counts = actions["A"]()
    for name, run in actions.items():
        rows, counts = run()
        if not torch.equal(counts.to(expected_counts), expected_counts):
            raise GateFailed(f"{name} and A send different numbers of rows to the experts")
        if not torch.equal(rows, expected_rows):
            raise GateFailed(f"{name} and A sort the rows differently")
