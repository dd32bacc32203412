"""A classification head in the place of GPTModel's output layer, and what of a model trains.

S sequence length, b micro batch size, H hidden size, G classes.

The head is small, so every tensor-parallel rank holds it whole and computes the same logits: under
sequence parallelism it gathers the hidden states first, and each rank's gradient is its own part of
the same gradient. GPTModel treats it as its output layer, and so do schedules and checkpoints.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import FinetuneConfig


class ClassificationHead(torch.nn.Linear):
    """Hidden states ``[S, b, H]`` -> class logits ``[S, b, G]``, as an output layer is called."""

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__(config.hidden_size, num_classes, dtype=config.params_dtype)
        self.sequence_parallel = config.sequence_parallel
        with torch.no_grad():
            config.init_method(self.weight)
            self.bias.zero_()

    def forward(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Return ``(logits, None)``; ``weight`` (of tied embeddings) is None here.

        Communicates under sequence parallelism: an all-gather over the tensor-parallel group.
        """
        if self.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return super().forward(hidden_states), None


def make_classifier(model: GPTModel, finetune: FinetuneConfig) -> None:
    """Give the last stage's chunk its head, and let only what the mode says train.

    Before Megatron's DDP and optimizer are built, which pass over what does not train. No
    communication.
    """
    if finetune.mode == "head":
        model.requires_grad_(False)
    if model.post_process:
        model.output_layer = ClassificationHead(model.config, int(finetune.num_classes or 0))
