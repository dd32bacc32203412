"""The codebook as a Megatron router: usable with Megatron's own MoE layer and dispatchers.

S sequence length, B batch, T = S * B tokens, N experts, C codes per token.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.code_assigner import CodeAssigner

CODES_PER_EXPERT = 4  # default K = 4 N


class VQRouter(MegatronModule):
    """Route each token to the expert of its nearest code.

    Use as ``MoESubmodules(router=VQRouter)`` or, with settings,
    ``MoESubmodules(router=functools.partial(VQRouter, vq=VQConfig(...)))``. Megatron's dispatchers
    carry the tokens themselves, so the expert input is always the token (``expert_input: token``);
    :class:`vqmoe_megatron.moe.VQMoELayer` has the other inputs.

    Raises:
        ValueError: for another expert input, or sizes that do not fit the codebook.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        vq: VQConfig | None = None,
        seed: int = 1234,
    ) -> None:
        super().__init__(config)
        if vq is None:
            vq = VQConfig(
                num_codes=CODES_PER_EXPERT * config.num_moe_experts,
                path="discrete",
                expert_input="token",
            )
        if vq.expert_input != "token":
            raise ValueError(
                f"vq.expert_input={vq.expert_input}: VQRouter leaves dispatch to Megatron, which "
                "sends "
                "the tokens; use expert_input=token, or VQMoELayer for code and blend inputs"
            )
        dispatcher = config.moe_token_dispatcher_type
        if vq.num_code_slices > 1 and (
            dispatcher == "flex" or (dispatcher == "alltoall" and config.moe_permute_fusion)
        ):
            raise ValueError(
                f"vq.num_code_slices={vq.num_code_slices} gives tokens different numbers of "
                "experts, but "
                f"the {dispatcher} dispatcher with moe_permute_fusion={config.moe_permute_fusion} "
                "carries "
                "exactly moe_router_topk rows per token; use allgather, alltoall without "
                "moe_permute_fusion, or VQMoELayer"
            )
        self.assigner = CodeAssigner(config, vq, pg_collection or get_default_pg_collection(), seed)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; decides this layer's random choices."""
        self.layer_number = layer_number
        self.assigner.set_layer_number(layer_number)

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(probs [T, N] fp32, routing_map [T, N] bool)`` for hidden states [S, B, H].

        A code counts 1 / sqrt(C); codes of one token on one expert are merged by adding their
        weights, which is exact because all rows of a token are the same token. The VQ losses ride
        on ``probs``.

        Raises:
            ValueError: for a padding mask, which a codebook has no use for.
        """
        if padding_mask is not None:
            raise ValueError("VQRouter takes no padding mask: every token has a nearest code")
        assignment = self.assigner(input.reshape(-1, input.shape[-1]))
        num_tokens, num_slices = assignment.experts.shape
        probs = torch.zeros(num_tokens, self.config.num_moe_experts, device=input.device)
        weight = torch.full_like(assignment.experts, 1, dtype=probs.dtype) / num_slices**0.5
        probs = probs.scatter_add(1, assignment.experts, weight)
        routing_map = probs > 0
        return self.assigner.attach(probs, assignment), routing_map
