"""An arm in the words of the cost model: what ``plan/`` predicts its bytes from."""

from __future__ import annotations

from collections.abc import Mapping

from vqmoe_megatron.bench.arm_table import ArmSpec
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.config.vq import VQConfig
from vqmoe_megatron.plan.shape import LayerShape

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def layer_shape(case: LayerCase, spec: ArmSpec, sizes: Mapping[str, int]) -> LayerShape:
    """Return the shape of an arm of kind ``vqmoe``.

    Args:
        case: sizes.
        spec: the arm.
        sizes: the layout's parallel sizes; those left out are 1.
    """
    return LayerShape(
        vq=VQConfig(num_codes=case.num_codes, norm=case.norm, **spec.vq),
        num_local_tokens=case.num_tokens,
        hidden_size=case.hidden_size,
        moe_ffn_hidden_size=case.ffn_hidden_size,
        num_moe_experts=case.num_experts,
        moe_router_topk=spec.topk,
        bytes_per_element=ELEMENT_BYTES[case.dtype],
        expert_model_parallel_size=sizes.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=sizes.get("expert_tensor_parallel_size", 1),
        tensor_model_parallel_size=sizes.get("tensor_model_parallel_size", 1),
        num_microbatches=spec.num_microbatches,
    )
