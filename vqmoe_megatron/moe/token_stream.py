"""The model's token ids, told to layers that route by them.

b sequences of S tokens, T tokens of this rank, V vocabulary entries (padded).

A pre-hook of the model reads the ids of a microbatch before its first layer runs, on every pipeline
stage; each rank keeps those of its own tokens, in the order of hidden states ``[S, b, H]``. With
context parallelism the model is called with this rank's part of the ids, and a token's expert needs
no other: nothing is sent. Which microbatch a layer works on, also in a recomputed pass, is known as
a code memory knows it (``memory/microbatches``).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.moe.context_cut import own_shard
from vqmoe_megatron.moe.memory.attach import follow_output, given_inputs
from vqmoe_megatron.moe.memory.microbatches import Microbatches


class TokenStream:
    """Token ids of the microbatches under way, of one model chunk.

    Args:
        config: of the model.
        vocab_size: V.
        pg_collection: ``tp``.
    """

    def __init__(
        self, config: TransformerConfig, vocab_size: int, pg_collection: ProcessGroupCollection
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.tp = pg_collection.tp
        self.microbatches: Microbatches[torch.Tensor] = Microbatches()

    def begin(self, token_ids: torch.Tensor) -> None:
        """Take the int64 ids ``[b, S]`` of one microbatch, or this context-parallel rank's part of
        them. No communication."""
        self.microbatches.begin(own_shard(token_ids.t(), self.tp, self.config.sequence_parallel))

    def own_ids(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """int64 ``[T]`` of the tokens whose hidden states ``[S, b, H]`` a layer sees.

        Raises:
            ValueError: where no microbatch was begun, or one of another size.
        """
        ids = self.microbatches.current
        if ids is None or ids.shape != hidden_states.shape[:2]:
            found = "no token ids" if ids is None else f"token ids {list(ids.shape)}"
            raise ValueError(
                f"a layer that routes by token ids sees {list(hidden_states.shape[:2])} tokens and "
                f"was told {found}; attach the stream that the layer was built with: "
                "vqmoe_megatron.moe.attach_token_stream(model, stream), as vqmoe pretrain does"
            )
        return ids.flatten()

    def follow_output(self, output: torch.Tensor) -> None:
        """The chunk's decoder gave ``output``; its backward pass belongs to this microbatch."""
        self.microbatches.follow(output)


def attach_token_stream(model: torch.nn.Module, stream: TokenStream) -> None:
    """Tell ``stream`` what ``model``, Megatron's GPTModel or one chunk of it, is called with.

    Call it before the model is wrapped. No communication. The model then raises ``ValueError`` for
    a call without token ids.
    """

    def begin(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict) -> None:
        (token_ids,) = given_inputs(args, kwargs, ("input_ids",))
        if token_ids is None:
            raise ValueError(
                "a model that routes by token ids (model.moe_router=hash or stable_moe) needs "
                "input_ids on every pipeline stage"
            )
        stream.begin(token_ids)

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.decoder.register_forward_hook(follow_output(stream))
