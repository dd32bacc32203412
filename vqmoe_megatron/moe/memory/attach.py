"""The stream of codes tied to a model: it is told tokens, embeddings and backward passes by hooks.

Nothing of Megatron is changed: a pre-hook of the model reads token and position ids, a hook of its
decoder sees the output, and a pre-hook of each layer lets its rows travel during attention.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from vqmoe_megatron.moe.memory.code_stream import CodeStream

POSITIONAL = ("input_ids", "position_ids")  # of GPTModel, in front of others
CACHES = ("inference_context", "inference_params")  # a call with one sees only the newest tokens


def attach_code_stream(model: torch.nn.Module, stream: CodeStream) -> None:
    """Make ``stream`` a part of ``model``, Megatron's GPTModel or one chunk of it.

    Documents start where ``position_ids`` are zero, and where ``packed_seq_params`` say so: rows
    are never read across. Call it before the model is wrapped. No communication.

    With context parallelism the model is called with this rank's part of ids and positions, as
    Megatron's ``get_batch_on_this_cp_rank`` cuts them.

    The model then raises ``ValueError`` for a call without token or position ids, for one with
    a cache of keys and values, which sees only the newest tokens, and with context parallelism for
    packed sequences, which Megatron cuts one by one.
    """
    model.code_stream = stream
    embedding = getattr(model, "embedding", None)
    stream.bind(None if embedding is None else embedding.word_embeddings)
    model.register_forward_pre_hook(_begin_microbatch, with_kwargs=True)
    model.decoder.register_forward_hook(follow_output(stream))


def given_inputs(args: tuple[Any, ...], kwargs: dict, names: tuple[str, ...]) -> list[Any]:
    """What a call of Megatron's GPTModel gives for ``names``; None for what it leaves out."""
    given = dict(zip(POSITIONAL, args, strict=False)) | kwargs
    return [given.get(name) for name in names]


def _begin_microbatch(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict) -> None:
    token_ids, position_ids = given_inputs(args, kwargs, POSITIONAL)
    if token_ids is None or position_ids is None:
        raise ValueError(
            "a model with code memory needs input_ids and position_ids on every pipeline stage: "
            "rows are found by token ids before the first layer runs"
        )
    if any(cache is not None for cache in given_inputs(args, kwargs, CACHES)):
        raise ValueError(
            "a model with code memory reads rows by earlier tokens of the same call; evaluate "
            "whole sequences, without a cache of keys and values (inference_context)"
        )
    starts = position_ids == 0
    (packed,) = given_inputs(args, kwargs, ("packed_seq_params",))
    if packed is not None:
        if model.code_stream.pg_collection.cp.size() > 1:
            raise ValueError(
                "a model with code memory and context_parallel_size > 1 takes no "
                "packed_seq_params: Megatron cuts packed sequences one by one, and only whole "
                "samples are put together here; use context_parallel_size=1"
            )
        starts = starts | _packed_starts(packed, starts)
    model.code_stream.begin(token_ids, starts)


def _packed_starts(packed: PackedSeqParams, like: torch.Tensor) -> torch.Tensor:
    """Bool ``[b, S]`` from cumulative lengths over all b * S tokens, padding included."""
    padded = packed.cu_seqlens_q_padded
    lengths = packed.cu_seqlens_q if padded is None else padded
    starts = torch.zeros(like.numel() + 1, dtype=torch.bool, device=like.device)
    starts[lengths.long()] = True
    return starts[:-1].view_as(like)


def follow_output(stream: Any) -> Any:
    """A forward hook of the decoder that tells ``stream`` its output."""

    def hook(_: torch.nn.Module, __: tuple, output: Any) -> None:
        stream.follow_output(output[0] if isinstance(output, tuple) else output)

    return hook
