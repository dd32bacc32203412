"""Arms as running layers: how each is built, run for one step, and read for its gradients.

T tokens, H hidden size, F expert hidden size, K codes, C code slices, n local experts, M
microbatches of a step.

Megatron's own MoE layer, holding the shared weights, is what every ratio is taken against. On CUDA
with Transformer Engine its experts are TE's grouped GEMM and its permutation is fused; else they
are Megatron's ``SequentialMLP``. The dispatcher is ``alltoall``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.bench.arm_table import FORWARD, ArmSpec
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.released import ReleasedLayer
from vqmoe_megatron.bench.shared_inputs import CaseInputs, Weights, share_weights
from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.codebook_sync import CodebookSync
from vqmoe_megatron.moe.grouped_experts import GroupedExperts
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.routers.topk import BalancedRouter
from vqmoe_megatron.moe.spec import spec_backend
from vqmoe_megatron.runtime.cpu_compat.missing_names import name_missing_functions
from vqmoe_megatron.runtime.graphs import Graph


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
        for parameter in [*self.module.parameters(), *self.all_parameters()]:
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
            if isinstance(self.module, VQMoELayer):
                self.module.start_ahead()
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

    def all_parameters(self) -> list[torch.nn.Parameter]:
        """Those named in ``parameters``, one by one."""
        return [parameter for parts in self.parameters.values() for parameter in parts]


def _stacked(parts: list[torch.nn.Parameter]) -> torch.Tensor:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
    return gradients[0].clone() if len(gradients) == 1 else torch.stack(gradients)


def build_arms(
    specs: Mapping[str, ArmSpec],
    inputs: CaseInputs,
    new_graph: Callable[[], Graph] | None = None,
) -> dict[str, Arm]:
    """Build every arm around the same weights and codes. No communication.

    ``new_graph`` captures the discrete path of ours, as in :class:`VQMoELayer`.

    Raises:
        ValueError: when an arm's settings do not fit the case.
    """
    return {letter: _build(spec, inputs, new_graph) for letter, spec in specs.items()}


def _build(spec: ArmSpec, inputs: CaseInputs, new_graph: Callable[[], Graph] | None) -> Arm:
    case, weights = inputs.case, inputs.weights
    vq = VQConfig(
        num_codes=case.num_codes,
        norm=case.norm,
        init="uniform",  # given below
        **({"path": "continuous"} if spec.kind == "megatron" else spec.vq),
    )
    if spec.kind == "megatron":
        layer, parameters = megatron_layer(case, spec.topk, spec.uses_own_experts, weights)
        return Arm(spec, layer, vq, parameters)
    codes = inputs.tokens.codes.to(torch.cuda.current_device())
    if spec.kind == "released":
        released = ReleasedLayer(vq, codes, weights)
        return Arm(spec, released, vq, released.named())
    layer = VQMoELayer(
        transformer_config(case, spec.topk),
        own_submodules(),
        layer_number=1,
        vq=vq,
        new_graph=new_graph,
    )
    share_weights(layer, weights)
    for path in layer.discrete_paths:
        path.assigner.codebook.adopt(_sliced(codes, vq.num_code_slices))
    shared = {name: [p] for name, p in layer.named_parameters() if name in weights}
    return Arm(spec, layer, vq, shared)


def _sliced(codes: torch.Tensor, num_slices: int) -> torch.Tensor:
    """[K, H] -> [C, K, H / C]: a token near code k is near code k of every slice."""
    return codes.unflatten(1, (num_slices, -1)).transpose(0, 1).contiguous()


def transformer_config(case: LayerCase, topk: int, **changes: Any) -> TransformerConfig:
    """Return the configuration of one layer on the current layout, without biases or balance
    loss. ``changes``: fields of it that shall be others."""
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    has_engine = spec_backend()[0] == "transformer_engine"
    dtype = getattr(torch, case.dtype)
    settings: dict[str, Any] = dict(
        num_layers=1,
        hidden_size=case.hidden_size,
        num_attention_heads=tensor_parallel,  # a layer has none; Megatron wants a multiple of TP
        num_moe_experts=case.num_experts,
        moe_ffn_hidden_size=case.ffn_hidden_size,
        ffn_hidden_size=case.ffn_hidden_size,
        moe_router_topk=topk,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=has_engine,
        moe_permute_fusion=has_engine,
        add_bias_linear=False,
        activation_func=torch.nn.functional.gelu,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tensor_parallel,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        sequence_parallel=tensor_parallel > 1,
    )
    return TransformerConfig(**{**settings, **changes})


def own_submodules() -> MoESubmodules:
    """Return the package's grouped experts and router, as its layer specs use them."""
    return MoESubmodules(router=BalancedRouter, experts=ModuleSpec(module=GroupedExperts))


def megatron_layer(
    case: LayerCase, topk: int, uses_own_experts: bool, weights: Weights
) -> tuple[MoELayer, dict[str, list[torch.nn.Parameter]]]:
    """Build the layer around the shared weights.

    Args:
        case: sizes and dtype.
        topk: experts per token.
        uses_own_experts: put the package's ``GroupedExperts`` into Megatron's layer, so that only
            routing and dispatch differ.
        weights: of this rank.

    Returns:
        The layer, and its parameters by their shared names; where Megatron keeps one parameter per
        expert, the list of them, to be stacked. No communication.
    """
    name_missing_functions()
    if uses_own_experts:
        submodules = own_submodules()
    else:
        has_engine = spec_backend()[0] == "transformer_engine"
        spec = get_moe_module_spec(has_engine, case.num_experts, moe_grouped_gemm=has_engine)
        submodules = MoESubmodules(experts=spec.submodules.experts)
    layer = MoELayer(transformer_config(case, topk), submodules, layer_number=1)
    share_weights(layer, weights)
    by_name = {"router.weight": [layer.router.weight]}
    for name in ("experts.weight1", "experts.weight2"):
        by_name[name] = [weights[name]]
        if not uses_own_experts:
            by_name[name] = _share_per_expert(layer, name, weights[name])
    return layer, by_name


def _share_per_expert(
    layer: MoELayer, name: str, stacked: torch.nn.Parameter
) -> list[torch.nn.Parameter]:
    """Give each expert its row of ``stacked`` [n, ...]: a parameter of its own, the same memory."""
    linear = {"experts.weight1": "linear_fc1", "experts.weight2": "linear_fc2"}[name]
    parameters = []
    for expert, view in enumerate(stacked.data.unbind(0)):
        parameter = torch.nn.Parameter(view)
        if hasattr(layer.experts, "local_experts"):  # SequentialMLP
            owner, attribute = getattr(layer.experts.local_experts[expert], linear), "weight"
        else:  # TEGroupedMLP
            owner, attribute = getattr(layer.experts, linear), f"weight{expert}"
        parameter.__dict__.update(getattr(owner, attribute).__dict__)  # Megatron's marks
        setattr(owner, attribute, parameter)
        parameters.append(parameter)
    return parameters
