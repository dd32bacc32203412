"""A baseline router in a rank, in fp64, beside what a plain oracle is told."""

from __future__ import annotations

from typing import Any

import torch
from tiny_layer import HIDDEN, NUM_EXPERTS, transformer_config

from vqmoe_megatron.config import RouterConfig

S, B, VOCAB = 12, 2, 20


def build(name: str, settings: dict[str, Any], with_tokens: bool = False, **changes: Any) -> Any:
    """The router of layer 1, fp64, its weights of a scale that matters; in training."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from vqmoe_megatron.moe.routers.builder import LayerRouter
    from vqmoe_megatron.moe.token_stream import TokenStream

    config = transformer_config(moe_router_dtype="fp64", **changes)
    groups = get_default_pg_collection()
    tokens = TokenStream(config, VOCAB, groups) if with_tokens else None
    filled = RouterConfig(**settings).for_run(name, NUM_EXPERTS, 10)
    layer_router = LayerRouter(name, filled, tokens)
    router = layer_router.builder(5)(config=config, pg_collection=groups).double()
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in router.named_parameters():
            if key != "temperature":
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn)
    return router


def states() -> torch.Tensor:
    """Hidden states ``[S, B, H]``, fp64, with gradient."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(S, B, HIDDEN, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def token_ids() -> torch.Tensor:
    """int64 ``[B, S]``."""
    return torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(6))


def weighing(probs: torch.Tensor) -> torch.Tensor:
    """A scalar in which every probability counts otherwise."""
    generator = torch.Generator().manual_seed(8)
    return (probs * torch.randn(probs.shape, generator=generator, dtype=probs.dtype)).sum()


def gradients(value: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of ``value`` by name of the inputs that it depends on."""
    found = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    return {name: g for name, g in zip(inputs, found, strict=True) if g is not None}


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference by name; both have the same names."""
    assert set(ours) == set(theirs), (sorted(ours), sorted(theirs))
    return {n: float((ours[n] - theirs[n]).abs().max()) for n in ours}


def compare(router: Any, x: torch.Tensor, oracle: Any) -> dict[str, Any]:
    """Map, values and every gradient of the router against ``oracle(x, weights)``, which returns
    weights ``[T, N]`` and a scalar loss that rides on them."""
    inputs = {"x": x, **{n: p for n, p in router.named_parameters() if p.requires_grad}}
    probs, routing_map = router(x)
    ours = gradients(weighing(probs), inputs)
    expected, loss = oracle(x.flatten(0, 1), dict(router.named_parameters()))
    theirs = gradients(weighing(expected) + loss, inputs)
    return {
        "values": float((probs - expected).abs().max()),
        "map": bool((routing_map[expected != 0]).all()),
        "per_token": routing_map.sum(dim=1).tolist(),
        "gradients": differences(ours, theirs),
        "largest": {name: float(g.abs().max()) for name, g in theirs.items()},
    }


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """bool ``[T, N]`` of the k largest of every token, by sorting."""
    order = scores.detach().sort(dim=1, descending=True).indices[:, :k]
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for token, experts in enumerate(order.tolist()):
        chosen[token, experts] = True
    return chosen
