"""``vqmoe bench memory``: what each arm's forward pass saves for its backward pass.

T tokens. Counted by :mod:`saved_tensors`, without parameters, buffers and the layer's input; the
arms pass the equality gate first. Beside it stands what ``plan/activation_memory.py``
predicts, which counts the rows in experts and the code table only, the part in which executions
differ. On CUDA the allocator's peak over a whole step, above what was allocated before it, is
measured as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vqmoe_megatron.bench.arm_table import FORWARD_BACKWARD, choose_arms
from vqmoe_megatron.bench.arms import Arm, build_arms
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.gate import check_arms, check_routing
from vqmoe_megatron.bench.plan_shape import layer_shape
from vqmoe_megatron.bench.routing import routed_tokens
from vqmoe_megatron.bench.saved_tensors import saved_bytes
from vqmoe_megatron.bench.weights import draw_weights
from vqmoe_megatron.plan.activation_memory import saved_bytes as predicted_saved_bytes


def measure_memory(
    case: LayerCase, letters: Sequence[str], say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Gate the arms of one case and count what they save; one row per arm.

    Raises:
        GateFailed: when arms disagree.
        ValueError: for unknown arms, or settings that an arm cannot take.

    Needs the process groups of one rank. No communication.
    """
    specs = choose_arms(letters, FORWARD_BACKWARD, case.hidden_size)
    tokens = routed_tokens(case)
    check_routing(case, tokens)
    weights = draw_weights(case, tokens.router_weight)
    x = tokens.x.to(torch.cuda.current_device()).unsqueeze(1)  # [T, 1, H]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(case.seed)).to(x)
    arms = build_arms(specs, case, tokens, weights)
    for arm in arms.values():
        arm.enter(FORWARD_BACKWARD)
    difference = check_arms(arms, case, weights, x, grad, FORWARD_BACKWARD)
    say(
        f"N={case.num_experts} K={case.num_codes} T={case.num_tokens} {case.routing}: "
        f"{len(arms)} arms agree to {difference:.1e}"
    )
    rows = []
    for letter, arm in arms.items():
        predicted = None
        if arm.spec.kind == "vqmoe":
            predicted = predicted_saved_bytes(layer_shape(case, arm.spec, {})).saved_bytes
        rows.append(
            {
                "arm": letter,
                "text": arm.spec.title,
                **case.identity,
                "expert_model_parallel_size": 1,
                "pass": FORWARD_BACKWARD,
                "median_ms": None,
                "p10_ms": None,
                "p90_ms": None,
                "wire_bytes": None,
                "saved_bytes": count_saved_bytes(arm, x),
                "predicted_saved_bytes": predicted,
                "peak_bytes": _peak_bytes(arm, x, grad),
            }
        )
    return rows


def count_saved_bytes(arm: Arm, x: torch.Tensor) -> int:
    """Return what one microbatch ``[T, 1, H]`` keeps; communicates as the layer's forward pass."""
    arm.forget()
    leaf = x.detach().clone().requires_grad_()
    module = arm.module
    excluded = [leaf, *module.parameters(), *module.buffers()]
    excluded += [parameter for parts in arm.parameters.values() for parameter in parts]

    def forward() -> torch.Tensor:
        output, loss = module(leaf)
        return output if loss is None else output.sum() + loss

    num_bytes, _ = saved_bytes(forward, excluded)
    arm.forget()
    return num_bytes


def _peak_bytes(arm: Arm, x: torch.Tensor, grad: torch.Tensor) -> int | None:
    """The allocator's peak over a step above what lay there before; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    arm.forget()
    leaf = x.detach().clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    arm.step(leaf, grad)
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
    arm.forget()
    return peak_bytes
