"""The equality gate: nothing is timed before the arms were seen to compute what they should.

1. Tokens have the codes that the routing names, and Megatron's router picks the experts of these.
2. Every arm agrees with the oracle on a few tokens.
3. On all tokens, arms of one ``function`` agree with the first of them: in the output, in the
   gradients of the parameters they share and, where ``token_gradient`` is the same, in that of x.

Two tensors agree when no element differs by more than ``TOLERANCE`` times the largest element of
the second. Kernels for other row counts sum in another order, so equality cannot be bitwise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vqmoe_megatron.bench.arm_table import FORWARD
from vqmoe_megatron.bench.arms import Arm, ArmResult
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.failures import GateFailed
from vqmoe_megatron.bench.oracle_check import few_tokens, oracle_result
from vqmoe_megatron.bench.routing import RoutedTokens
from vqmoe_megatron.bench.weights import Weights
from vqmoe_megatron.vq.search import nearest_code

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
SMALLEST_SHARE = {"float32": 1.0, "bfloat16": 0.99}  # of tokens routed as the case says


def check_routing(case: LayerCase, tokens: RoutedTokens) -> None:
    """Step 1, on the CPU. Raises :class:`GateFailed` with the share of tokens that went astray."""
    experts = tokens.code_ids % case.num_experts
    logits = tokens.x.float() @ tokens.router_weight.float().t()
    shares = {
        "codes": (nearest_code(tokens.x, tokens.codes) == tokens.code_ids).double().mean(),
        "top-1 experts": (logits.argmax(dim=1) == experts).double().mean(),
    }
    for name, share in shares.items():
        if share < SMALLEST_SHARE[case.dtype]:
            raise GateFailed(
                f"only {float(share):.2%} of the tokens have the {name} that routing "
                f"{case.routing} gave them (N={case.num_experts}, K={case.num_codes}, "
                f"H={case.hidden_size}); take a larger hidden size"
            )


def check_arms(
    arms: Mapping[str, Arm],
    case: LayerCase,
    weights: Weights,
    x: torch.Tensor,
    grad: torch.Tensor,
    pass_name: str,
) -> float:
    """Steps 2 and 3 for one pass; the arms must be in its mode (:meth:`Arm.enter`).

    Args:
        arms: by letter.
        case: sizes; its dtype decides the tolerance.
        weights: shared by the arms.
        x: ``[T, 1, H]``.
        grad: ``[T, 1, H]`` of the output.
        pass_name: forward or forward_backward.

    Returns:
        The largest relative difference found.

    Raises:
        GateFailed: naming every pair and tensor that differ by more than the tolerance.

    Communicates as the layers do.
    """
    references: dict[str, tuple[str, ArmResult]] = {}  # by function: outputs and parameters
    x_references: dict[tuple[str, str], tuple[str, torch.Tensor]] = {}
    differences: dict[str, float] = {}
    few_x, few_grad = few_tokens(x), few_tokens(grad)
    for letter, arm in arms.items():
        expected = oracle_result(arm, case, weights, few_x, few_grad, pass_name)
        found = arm.result(few_x, few_grad, pass_name)
        differences |= _compare(f"{letter} and oracle", found, expected, with_x=True)
        found = arm.result(x, grad, pass_name)
        function = arm.spec.function
        if function in references:
            other, reference = references[function]
            differences |= _compare(f"{letter} and {other}", found, reference, with_x=False)
        references.setdefault(function, (letter, found))
        if pass_name != FORWARD:
            key = function, arm.spec.token_gradient
            if key in x_references:
                other, x_reference = x_references[key]
                of_x = relative_difference(found.gradients["x"], x_reference)
                differences[f"{letter} and {other}: gradient of x"] = of_x
            x_references.setdefault(key, (letter, found.gradients["x"]))
    limit = TOLERANCE[case.dtype]
    failed = [f"{what}: {value:.1e}" for what, value in differences.items() if not value <= limit]
    if failed:
        raise GateFailed(
            f"{pass_name} at N={case.num_experts}, K={case.num_codes}, T={case.num_tokens}, "
            f"{case.routing}: more than {limit:.0e} relative difference between\n  "
            + "\n  ".join(failed)
        )
    return max(differences.values())


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest element of ``expected``; NaN stays NaN."""
    expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
    difference = (found - expected).abs_().max()
    if difference == 0:
        return 0.0
    return float(difference / expected.abs().max())


def _compare(who: str, found: ArmResult, expected: ArmResult, with_x: bool) -> dict[str, float]:
    differences = {f"{who}: output": relative_difference(found.output, expected.output)}
    for name in found.gradients:
        if name in expected.gradients and (with_x or name != "x"):
            differences[f"{who}: gradient of {name}"] = relative_difference(
                found.gradients[name], expected.gradients[name]
            )
    return differences
