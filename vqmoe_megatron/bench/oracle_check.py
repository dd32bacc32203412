"""Arms against the oracle, on a few tokens: output, and every gradient in a backward pass.

T tokens, H hidden size, N experts. The oracle walks token by token, so it gets ``NUM_TOKENS`` of
the case's tokens, some of them twice: codes with several tokens are what group means are about.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.bench.arm_table import FORWARD
from vqmoe_megatron.bench.arms import Arm, ArmResult
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.weights import Weights
from vqmoe_megatron.vq.oracle import vqmoe_oracle

NUM_TOKENS = 8
NUM_DISTINCT = 6


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
    arm: Arm, case: LayerCase, weights: Weights, x: torch.Tensor, grad: torch.Tensor, pass_name: str
) -> ArmResult:
    """Return what the oracle computes, in fp32, in the shape of :meth:`Arm.result`.

    Args:
        arm: whose settings are taken.
        case: sizes.
        weights: shared, of one rank that holds all experts.
        x: ``[T, 1, H]``.
        grad: ``[T, 1, H]`` of the output.
        pass_name: gradients are taken in a backward pass only.

    No communication.
    """
    parameters = {
        name: _FewExperts(parameter)
        if name.startswith("experts.")
        else parameter.detach().float().requires_grad_()
        for name, parameter in weights.items()
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
        num_experts=case.num_experts,
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
