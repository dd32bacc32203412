"""A vision transformer on Megatron-core's transformer block, cut as Megatron cuts its GPT.

b images of a microbatch, C channels, P patch size, S patches of an image, H hidden size, TP
tensor-parallel ranks, N classes.

1. The first stage projects this rank's S / TP patches to H columns and adds learned positions.
2. Megatron's layers, with attention to all patches, hand [S / TP, b, H] on.
3. The last stage takes the mean over all S positions, and one linear layer makes N logits of it.

There is no class token: with one the sequence would be S + 1 long, which TP seldom divides.
Projection, positions and head are whole on every tensor-parallel rank. The first two see a shard of
the sequence, so they are marked as Megatron's norms are and their gradients summed over TP; the
head sees the same mean everywhere, and its gradients are equal.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VisionConfig


class PatchEmbedding(torch.nn.Module):
    """Patches [b, S, C P P], cut to this rank's share, become hidden states [S / TP, b, H]."""

    def __init__(self, config: TransformerConfig, vision: VisionConfig) -> None:
        super().__init__()
        self.config, self.patch_size = config, vision.patch_size
        hidden, dtype = config.hidden_size, config.params_dtype
        self.patch_projection = torch.nn.Linear(vision.patch_width, hidden, dtype=dtype)
        self.position_embeddings = torch.nn.Embedding(vision.num_patches, hidden, dtype=dtype)
        config.init_method(self.patch_projection.weight)
        config.embedding_init_method(self.position_embeddings.weight)
        torch.nn.init.zeros_(self.patch_projection.bias)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``[b, C, P a, P a]`` in the dtype of the model; no communication.

        Returns ``[S / TP, b, H]``: the patches of this rank, row by row of the image.
        """
        patches = cut_patches(images, self.patch_size)
        positions = self.position_embeddings.weight
        if self.config.sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            num_ranks = parallel_state.get_tensor_model_parallel_world_size()
            patches = patches.chunk(num_ranks, dim=1)[rank]
            positions = positions.chunk(num_ranks)[rank]
        hidden = self.patch_projection(patches) + positions  # [b, S / TP, H]
        hidden = hidden.transpose(0, 1).contiguous()
        fork = contextlib.nullcontext()
        if self.config.sequence_parallel:  # as in Megatron's embedding: every shard draws its own
            fork = tensor_parallel.get_cuda_rng_tracker().fork()
        with fork:
            return torch.nn.functional.dropout(hidden, self.config.hidden_dropout, self.training)


def cut_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut ``[b, C, P a, P c]`` into patches ``[b, a c, C P P]``, row by row of the image."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


class VisionTransformer(MegatronModule):
    """One chunk of the model: all of it, a pipeline stage, or one of its interleaved parts.

    Args:
        config: with learned positions, so without rotary ones.
        spec: the chunk's layers; their attention is made bidirectional here.
        vision: sizes of images, patches and the head.
        pre_process: whether the chunk is the first and holds the patch embedding.
        post_process: whether it is the last and holds the final norm and the head.
        vp_stage: number of the interleaved chunk, None without interleaving.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        vision: VisionConfig,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config)
        # What Megatron's schedules, end of gradients and Float16Module ask of a model.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = False
        self.num_patches = vision.num_patches
        if pre_process:
            self.embedding = PatchEmbedding(config, vision)
        self.decoder = TransformerBlock(
            config,
            bidirectional(spec),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = torch.nn.Linear(
                config.hidden_size, vision.num_classes, dtype=config.params_dtype
            )
            config.init_method(self.output_layer.weight)
            torch.nn.init.zeros_(self.output_layer.bias)

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take the hidden states ``[S / TP, b, H]`` of the stage before, as the schedules give."""
        is_list = isinstance(input_tensor, list)
        self.decoder.set_input_tensor(input_tensor[0] if is_list else input_tensor)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Evaluate a microbatch.

        Args:
            images: ``[b, C, P a, P a]``; read by the first chunk only.

        Returns:
            Logits ``[b, N]``, equal on all tensor-parallel ranks, from the last chunk; hidden
            states ``[S / TP, b, H]`` from the others. The last communicates one all-reduce of
            ``[b, H]`` over the tensor-parallel group; layers as they do.
        """
        hidden = self.embedding(images) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=None)
        if not self.post_process:
            return hidden
        total = hidden.sum(dim=0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        if self.config.sequence_parallel:
            total = tensor_parallel.reduce_from_tensor_model_parallel_region(total)
        return self.output_layer((total / self.num_patches).to(self.output_layer.weight.dtype))


def bidirectional(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The layers of ``spec``, whose tokens see all others and not only those before them."""
    layers = []
    for layer in spec.layer_specs:
        layer, submodules = copy.copy(layer), copy.copy(layer.submodules)
        layer.submodules, attention = submodules, copy.copy(submodules.self_attention)
        attention.params = attention.params | {"attn_mask_type": AttnMaskType.no_mask}
        submodules.self_attention = attention
        layers.append(layer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=spec.layer_norm)
