"""A whole Transformer-XL in plain torch, one rank, token by token where that is clearer.

The oracle of the tests: written from the paper's equations, without a shift, a projection of
several things at once or a batch of heads. Weights are looked up by Megatron's names.

S tokens of a segment, M of memory, b sequences, H hidden size, A heads of d columns, G groups.
"""

from __future__ import annotations

import math

import torch


def distance_vector(distance: int, width: int) -> torch.Tensor:
    """R of one distance, fp64 ``[H]``."""
    angles = [distance / 10000 ** (2 * i / width) for i in range(width // 2)]
    values = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(values, dtype=torch.float64)


def layer_norm(x: torch.Tensor, weights: dict, name: str) -> torch.Tensor:
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
    )


def attention(x: torch.Tensor, memory: torch.Tensor, weights: dict, prefix: str, heads: int):
    """Output ``[S, b, H]`` of a segment ``x`` behind ``memory`` ``[M, b, H]``, before residuals."""
    normed = layer_norm(torch.cat([memory, x]), weights, f"{prefix}input_layernorm")
    of = f"{prefix}self_attention."
    qkv, bias = weights[f"{of}linear_qkv.weight"], weights[f"{of}linear_qkv.bias"]
    columns = weights[f"{of}linear_proj.weight"].shape[1] // heads
    groups = (qkv.shape[0] // columns - heads) // 2
    per_group = heads // groups
    qkv = qkv.view(groups, per_group + 2, columns, -1)
    bias = bias.view(groups, per_group + 2, columns)
    core = f"{of}core_attention."
    num_memory, length, batch = memory.shape[0], *x.shape[:2]
    outputs = []
    for head in range(heads):
        group, own = head // per_group, slice(head * columns, (head + 1) * columns)
        query, key, value = (
            torch.einsum("sbh,dh->sbd", normed, qkv[group, row]) + bias[group, row]
            for row in (head % per_group, per_group, per_group + 1)
        )
        u, v = weights[f"{core}content_bias"][own], weights[f"{core}position_bias"][own]
        place = weights[f"{core}position_weight"][own]  # [d, H]
        rows = []
        for i in range(length):
            position = num_memory + i
            scores = torch.stack(
                [
                    (
                        ((query[position] + u) * key[j]).sum(-1)
                        + (query[position] + v)
                        @ (place @ distance_vector(position - j, x.shape[-1]))
                    )
                    / math.sqrt(columns)
                    for j in range(position + 1)
                ]
            )  # [keys, b]
            weight = torch.softmax(scores, dim=0)
            rows.append((weight[:, :, None] * value[: position + 1]).sum(0))
        outputs.append(torch.stack(rows))
    joined = torch.cat(outputs, dim=-1).reshape(length, batch, -1)
    projected = joined @ weights[f"{of}linear_proj.weight"].T
    return projected + weights[f"{of}linear_proj.bias"]


def losses(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    memories: list[torch.Tensor],
    weights: dict,
    heads: int,
    memory_length: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Token losses ``[b, S]`` of one segment, and the memories of all layers behind it.

    Every layer's MLP is the one expert of a model without router.
    """
    x = weights["embedding.word_embeddings.weight"][tokens].transpose(0, 1)
    behind = []
    for number, memory in enumerate(memories):
        prefix = f"decoder.layers.{number}."
        behind.append(torch.cat([memory, x.detach()])[-memory_length:])
        x = x + attention(x, memory, weights, prefix, heads)
        inner = layer_norm(x, weights, f"{prefix}pre_mlp_layernorm")
        experts = f"{prefix}mlp.experts."
        inner = inner @ weights[f"{experts}weight1"][0].T + weights[f"{experts}bias1"][0]
        inner = torch.nn.functional.gelu(inner)
        x = x + inner @ weights[f"{experts}weight2"][0].T + weights[f"{experts}bias2"][0]
    x = layer_norm(x, weights, "decoder.final_layernorm")
    logits = (x @ weights["output_layer.weight"].T).transpose(0, 1)
    lost = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    )
    return lost.view(labels.shape), behind
