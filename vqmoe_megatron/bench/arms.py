"""Arms as running layers: how each is built, run for one step, and read for its gradients.

T tokens, H hidden size, K codes, C code slices, M microbatches of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vqmoe_megatron.bench.arm_table import FORWARD, ArmSpec
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.megatron_layer import megatron_layer, own_submodules, transformer_config
from vqmoe_megatron.bench.released import ReleasedLayer
from vqmoe_megatron.bench.routing import RoutedTokens
from vqmoe_megatron.bench.weights import Weights, share_weights
from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.codebook_sync import CodebookSync
from vqmoe_megatron.moe.layer import VQMoELayer


@dataclass(frozen=True)
class ArmResult:
    """What one step of an arm computed; gradients are means over its microbatches."""

    output: torch.Tensor  # [T, 1, H]
    gradients: dict[str, torch.Tensor]  # by parameter name, and "x"; empty in a forward pass


class Arm:
    """One layer that holds the shared weights.

    ``parameters`` names those whose gradients arms have in common; a list of several is one tensor,
    cut along its first axis.
    """

    def __init__(
        self,
        spec: ArmSpec,
        module: torch.nn.Module,
        vq: VQConfig,
        parameters: dict[str, list[torch.nn.Parameter]],
    ) -> None:
        self.spec = spec
        self.module = module
        self.vq = vq
        self.parameters = parameters

    def enter(self, pass_name: str) -> None:
        """Switch to evaluation for ``forward``, to training for ``forward_backward``."""
        self.module.train(pass_name != FORWARD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, 1, H]`` -> ``[T, 1, H]`` without gradient; communicates as the layer does."""
        with torch.no_grad():
            return self.module(x)[0]

    def forget(self) -> None:
        """Drop gradients and the step's statistics, so that the next run is a step of its own."""
        for parameter in [*self.module.parameters(), *self._all_parameters()]:
            parameter.grad = None
        CodebookSync().discard([self.module])

    def step(
        self,
        x: torch.Tensor,
        grad: torch.Tensor,
        enter_pass: Callable[[bool], None] = lambda is_backward: None,
    ) -> torch.Tensor:
        """Run M times forward and backward, and what ends a step; return the last output.

        Args:
            x: ``[T, 1, H]``, a leaf.
            grad: ``[T, 1, H]`` of the output; VQ losses come on top.
            enter_pass: told False before every forward and True before every backward pass.

        Communicates as the layer does.
        """
        for _ in range(self.spec.num_microbatches):
            enter_pass(False)
            output, loss = self.module(x)
            enter_pass(True)
            roots = [output] if loss is None else [output, loss]
            torch.autograd.backward(roots, [grad, None][: len(roots)])
        if isinstance(self.module, VQMoELayer):
            self.module.finish_table()
        return output.detach()

    def result(self, x: torch.Tensor, grad: torch.Tensor, pass_name: str) -> ArmResult:
        """Run once; take the output and, in a backward pass, every gradient."""
        if pass_name == FORWARD:
            return ArmResult(self.forward(x), {})
        self.forget()
        leaf = x.detach().clone().requires_grad_()
        output = self.step(leaf, grad)
        gradients = {name: _stacked(parts) for name, parts in self.parameters.items()}
        gradients["x"] = leaf.grad
        self.forget()
        return ArmResult(
            output, {name: g / self.spec.num_microbatches for name, g in gradients.items()}
        )

    def _all_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parts in self.parameters.values() for parameter in parts]


def _stacked(parts: list[torch.nn.Parameter]) -> torch.Tensor:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
    return gradients[0].clone() if len(gradients) == 1 else torch.stack(gradients)


def build_arms(
    specs: Mapping[str, ArmSpec], case: LayerCase, tokens: RoutedTokens, weights: Weights
) -> dict[str, Arm]:
    """Build every arm around the same weights and codes. No communication."""
    return {letter: build_arm(spec, case, tokens, weights) for letter, spec in specs.items()}


def build_arm(spec: ArmSpec, case: LayerCase, tokens: RoutedTokens, weights: Weights) -> Arm:
    """Build one arm.

    Raises:
        ValueError: when the arm's settings do not fit the case.
    """
    vq = VQConfig(
        num_codes=case.num_codes,
        norm=case.norm,
        init="uniform",  # given below
        **({"path": "continuous"} if spec.kind == "megatron" else spec.vq),
    )
    if spec.kind == "megatron":
        layer, parameters = megatron_layer(case, spec.topk, spec.uses_own_experts, weights)
        return Arm(spec, layer, vq, parameters)
    codes = tokens.codes.to(torch.cuda.current_device())
    if spec.kind == "released":
        released = ReleasedLayer(vq, codes, weights)
        return Arm(spec, released, vq, released.named())
    layer = VQMoELayer(transformer_config(case, spec.topk), own_submodules(), layer_number=1, vq=vq)
    share_weights(layer, weights)
    for path in layer.discrete_paths:
        path.assigner.codebook.adopt(_sliced(codes, vq.num_code_slices))
    shared = {name: [p] for name, p in layer.named_parameters() if name in weights}
    return Arm(spec, layer, vq, shared)


def _sliced(codes: torch.Tensor, num_slices: int) -> torch.Tensor:
    """[K, H] -> [C, K, H / C]: a token near code k is near code k of every slice."""
    return codes.unflatten(1, (num_slices, -1)).transpose(0, 1).contiguous()
