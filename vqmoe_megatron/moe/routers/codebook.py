"""The codebook as a Megatron router: usable with Megatron's own MoE layer and dispatchers.

S sequence length, B batch, T = S * B tokens, N experts, C codes per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.code_assigner import CodeAssigner
from vqmoe_megatron.moe.foreign_loop import follow
from vqmoe_megatron.moe.megatron_settings import check_router_settings, refuse_trained_codes_in_half
from vqmoe_megatron.moe.step_owner import StepOwner

CODES_PER_EXPERT = 4  # default K = 4 N


class VQRouter(StepOwner, MegatronModule):
    """Route each token to the expert of its nearest code.

    Use as ``MoESubmodules(router=VQRouter)`` or, with settings,
    ``MoESubmodules(router=functools.partial(VQRouter, vq=VQConfig(...)))``. Megatron's dispatchers
    carry the tokens themselves, so the expert input is always the token (``expert_input: token``);
    :class:`vqmoe_megatron.moe.VQMoELayer` has the other inputs.

    Raises:
        ValueError: for another expert input, sizes that do not fit the codebook, or a setting of
            Megatron's learned router that a codebook has no use for.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        vq: VQConfig | None = None,
        seed: int = 1234,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config)
        check_router_settings(config)
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
        num_rows = (vq.num_code_slices, config.moe_router_topk)
        if num_rows != (1, 1) and (
            dispatcher == "flex" or (dispatcher == "alltoall" and config.moe_permute_fusion)
        ):
            raise ValueError(
                f"the {dispatcher} dispatcher with moe_permute_fusion={config.moe_permute_fusion} "
                f"carries moe_router_topk={config.moe_router_topk} rows per token, but "
                f"vq.num_code_slices={vq.num_code_slices} gives a token up to so many experts; set "
                "both to 1, or use allgather, alltoall without moe_permute_fusion, or VQMoELayer"
            )
        self.assigner = CodeAssigner(config, vq, pg_collection or get_default_pg_collection(), seed)
        # Newer Megatrons number the layers of multi-token prediction from 1 again, and say so.
        self.num_layers_before = config.num_layers if is_mtp_layer else 0
        self.layer_number: int | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; decides this layer's random choices."""
        self.layer_number = layer_number + self.num_layers_before
        self.assigner.set_layer_number(self.layer_number)

    # What ends once per optimizer step (step_owner).
    @property
    def replica_group(self) -> torch.distributed.ProcessGroup:
        """``tp_dp_cp``."""
        return self.assigner.pg_collection.tp_dp_cp

    def refuse_foreign_optimizer(self) -> None:
        """Raise ``ValueError`` for trained codes among weights of half precision."""
        refuse_trained_codes_in_half(self.config, self.assigner.codebook)

    def local_parts(self) -> list[torch.Tensor]:
        """What the assigner summed."""
        return self.assigner.local_parts()

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Code usage and VQ losses."""
        return self.assigner.scalars_of(parts)

    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> tuple[dict, ...]:
        """Move the codebook; return scalars, no expert load, and usage ``[C, K]``."""
        scalars, usage = self.assigner.apply_parts(reduced)
        return scalars, None, usage

    def clear_step(self) -> None:
        """Forget what the assigner recorded."""
        super().clear_step()
        self.assigner.clear_step()

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
        if self.training:
            follow(self, self.config)
        assignment = self.assigner(input.reshape(-1, input.shape[-1]))
        num_tokens, num_slices = assignment.experts.shape
        probs = torch.zeros(num_tokens, self.config.num_moe_experts, device=input.device)
        weight = torch.full_like(assignment.experts, 1, dtype=probs.dtype) / num_slices**0.5
        probs = probs.scatter_add(1, assignment.experts, weight)
        routing_map = probs > 0
        probs = self.assigner.attach(probs, assignment)
        if self.training and torch.is_grad_enabled():
            probs = run_in_backward(probs, self.recorded)
        return probs, routing_map
