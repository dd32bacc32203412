"""The equality gate: nothing is timed before the arms were seen to compute what they should.

1. Tokens have the codes that the routing names, and Megatron's router picks the experts of these.
2. Every arm agrees with the oracle: output, and every gradient in a backward pass. The oracle walks
   token by token, so it gets ``NUM_TOKENS`` of the tokens, some of them twice: codes with several
   tokens are what group means are about.
3. On all tokens, arms of one ``function`` agree with the first of them: in the output, in the
   gradients of the parameters they share and, where ``token_gradient`` is the same, in that of x.

Two tensors agree when no element differs by more than ``TOLERANCE`` times the largest element of
the second. Kernels for other row counts sum in another order, so equality cannot be bitwise.

T tokens, H hidden size, N experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vqmoe_megatron.bench.arm_table import FORWARD
from vqmoe_megatron.bench.arms import Arm, ArmResult
from vqmoe_megatron.bench.cases import GateFailed
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.shared_inputs import CaseInputs
from vqmoe_megatron.vq.oracle import vqmoe_oracle
from vqmoe_megatron.vq.search import nearest_code

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
NUM_TOKENS = 8
NUM_DISTINCT = 6
SMALLEST_SHARE = {"float32": 1.0, "bfloat16": 0.99}  # of tokens routed as the case says


def check_routing(inputs: CaseInputs) -> None:
    """Step 1, on the CPU. Raises :class:`GateFailed` with the share of tokens that went astray."""
    case, tokens = inputs.case, inputs.tokens
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


def output_gradient(inputs: CaseInputs, seed: int) -> torch.Tensor:
    """Draw the gradient ``[T, 1, H]`` that every arm's output gets."""
    return torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(seed)).to(inputs.x)


def check_arms(
    arms: Mapping[str, Arm],
    inputs: CaseInputs,
    grad: torch.Tensor,
    pass_name: str,
    progress: Progress,
) -> str:
    """Switch the arms to a pass and take steps 2 and 3 for it.

    Args:
        arms: by letter.
        inputs: of the arms; the case's dtype decides the tolerance.
        grad: ``[T, 1, H]`` of the output.
        pass_name: forward or forward_backward.
        progress: is told of every arm.

    Returns:
        The largest relative difference found, as ``19 arms agree to 4.4e-05``.

    Raises:
        GateFailed: naming every pair and tensor that differ by more than the tolerance.

    Communicates as the layers do.
    """
    case = inputs.case
    references: dict[str, tuple[str, ArmResult]] = {}  # by function: outputs and parameters
    x_references: dict[tuple[str, str], tuple[str, torch.Tensor]] = {}
    differences: dict[str, float] = {}
    few_x, few_grad = few_tokens(inputs.x), few_tokens(grad)
    for number, (letter, arm) in enumerate(arms.items(), 1):
        progress.look(f"{case.words}: {pass_name} gate, arm {letter} ({number} of {len(arms)})")
        arm.enter(pass_name)
        expected = oracle_result(arm, inputs, few_x, few_grad, pass_name)
        found = arm.result(few_x, few_grad, pass_name)
        differences |= _compare(f"{letter} and oracle", found, expected, with_x=True)
        found = arm.result(inputs.x, grad, pass_name)
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
    return f"{len(arms)} arms agree to {max(differences.values()):.1e}"


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


class _FewExperts:
    """[N, ...] read expert by expert: fp32 leaves for those that are, so that the gradient of one
    does not take the memory of all."""

    def __init__(self, stacked: torch.Tensor) -> None:
        self.stacked = stacked
        self.leaves: dict[int, torch.Tensor] = {}

    def __getitem__(self, expert: int) -> torch.Tensor:
        if expert not in self.leaves:
            self.leaves[expert] = self.stacked[expert].detach().float().requires_grad_()
        return self.leaves[expert]

    @property
    def grad(self) -> torch.Tensor:
        whole = torch.zeros_like(self.stacked, dtype=torch.float32)
        for expert, leaf in self.leaves.items():
            whole[expert] = leaf.grad
        return whole


def few_tokens(x: torch.Tensor) -> torch.Tensor:
    """Return ``[NUM_TOKENS, ...]`` of ``[T, ...]``."""
    ids = torch.arange(NUM_TOKENS) % min(NUM_DISTINCT, x.shape[0])
    return x[ids.to(x.device)]


def oracle_result(
    arm: Arm, inputs: CaseInputs, x: torch.Tensor, grad: torch.Tensor, pass_name: str
) -> ArmResult:
    """Return what the oracle computes, in fp32, in the shape of :meth:`Arm.result`.

    Args:
        arm: whose settings are taken.
        inputs: sizes, and the weights of one rank that holds all experts.
        x: ``[T, 1, H]``.
        grad: ``[T, 1, H]`` of the output.
        pass_name: gradients are taken in a backward pass only.

    No communication.
    """
    parameters = {
        name: _FewExperts(parameter)
        if name.startswith("experts.")
        else parameter.detach().float().requires_grad_()
        for name, parameter in inputs.weights.items()
    }
    assigner = getattr(arm.module, "assigner", None)
    if assigner is not None:
        parameters["assigner.codebook.codes"] = assigner.codebook.codes.detach().float()
    elif arm.spec.kind == "released":
        parameters["assigner.codebook.codes"] = arm.module.codes.detach().unsqueeze(0)
    leaf = x[:, 0].detach().float().requires_grad_()
    found = vqmoe_oracle(
        leaf,
        parameters,
        arm.vq,
        num_experts=inputs.case.num_experts,
        topk=arm.spec.topk,
        activation=torch.nn.functional.gelu,
    )
    output = found.output.detach().unsqueeze(1)
    if pass_name == FORWARD:
        return ArmResult(output, {})
    ((found.output * grad[:, 0].float()).sum() + found.vq_loss).backward()
    gradients = {name: parameters[name].grad for name in arm.parameters}
    gradients["x"] = leaf.grad.unsqueeze(1)
    return ArmResult(output, gradients)
