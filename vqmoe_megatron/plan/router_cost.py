"""What the router of the continuous path takes: tensors, operations, sums and buffers, by its name.

T tokens, N experts, H hidden size, V padded vocabulary, d ``router.low_dim`` or ``light_dim``.

    topk, switch, loss_free   W [N, H], b [N]                           2 T H N
    smoe_dropout              the same, never trained; Megatron's       2 T H N
                              product forms the weights' gradient all the same
    x_moe                     R [d, H], e [N, d], tau [1] as published  2 T d (H + N)
    hash                      nothing; a table of expert by token id    0
    stable_moe, published     W [N, H], words [V, d], e [N, d]          2 T N (H + d) in stage 1
    stable_moe, released      W [N, H]                                  2 T H N

A backward pass takes twice as much. A package's router is counted as topk.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config.checks import settled
from vqmoe_megatron.plan.shape import LayerShape

ID_BYTES = COUNTER_BYTES = 8
SUM_BYTES = 4


@dataclass(frozen=True)
class RouterTensor:
    """One parameter of a router; every rank holds it whole."""

    name: str
    shape: tuple[int, ...]
    is_trained: bool = True


def router_tensors(layer: LayerShape, has_bias: bool, vocab_size: int) -> list[RouterTensor]:
    """In the order of the real module's parameters; ``has_bias``: ``add_bias_linear``."""
    experts, hidden, router = layer.num_moe_experts, layer.hidden_size, layer.router
    name, is_published = layer.moe_router, router.variant == "published"
    weight = RouterTensor("weight", (experts, hidden), name != "smoe_dropout")
    if name == "hash":
        return []
    if name == "x_moe":
        low_dim = settled(router.low_dim, "router.low_dim")
        found = [
            RouterTensor("projection_weight", (low_dim, hidden)),
            RouterTensor("expert_weight", (experts, low_dim)),
        ]
        return [*found, RouterTensor("temperature", (1,))] if is_published else found
    if name == "stable_moe":
        light = [
            RouterTensor("light_embedding_weight", (vocab_size, router.light_dim)),
            RouterTensor("light_expert_weight", (experts, router.light_dim)),
        ]
        return [weight, *light] if is_published else [weight]
    bias = RouterTensor("bias", (experts,), weight.is_trained)
    return [weight, bias] if has_bias else [weight]


def num_rows_not_read(layer: LayerShape, vocab_size: int) -> int:
    """Elements of the router that one token does not use: words of other tokens."""
    if layer.moe_router != "stable_moe" or layer.router.variant != "published":
        return 0
    return (vocab_size - 1) * layer.router.light_dim


def router_forward_flops(layer: LayerShape) -> int:
    """Of one microbatch on one rank; a backward pass takes twice as many."""
    if not layer.has_router or layer.moe_router == "hash":
        return 0
    experts, hidden, router = layer.num_moe_experts, layer.hidden_size, layer.router
    columns = experts * hidden
    if layer.moe_router == "x_moe":
        columns = settled(router.low_dim, "router.low_dim") * (hidden + experts)
    elif layer.moe_router == "stable_moe" and router.variant == "published":
        columns = experts * (hidden + router.light_dim)
    return 2 * layer.num_local_tokens * columns


def num_router_sums(layer: LayerShape) -> int:
    """fp32 sums of a step that are reduced over replicas: dropped tokens and tokens; tokens per
    expert; cross-entropy, agreements and tokens of the light router."""
    if not layer.has_router:
        return 0
    is_light = layer.moe_router == "stable_moe" and layer.router.variant == "published"
    return {"switch": 2, "loss_free": layer.num_moe_experts, "stable_moe": 3 * is_light}.get(
        layer.moe_router, 0
    )


def router_buffer_bytes(layer: LayerShape, vocab_size: int) -> int:
    """Sums, biases, a counter of steps, tables of expert by token id."""
    if not layer.has_router:
        return 0
    sums = num_router_sums(layer) * SUM_BYTES
    table = vocab_size * ID_BYTES
    is_light = layer.moe_router == "stable_moe" and layer.router.variant == "published"
    own = {
        "loss_free": layer.num_moe_experts * SUM_BYTES,
        "smoe_dropout": COUNTER_BYTES,
        "hash": table,
        "stable_moe": (table if is_light else 0) + COUNTER_BYTES,
    }
    return sums + own.get(layer.moe_router, 0)
