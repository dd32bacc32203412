"""What a router asks of the model's other settings.

N experts. Rules of the model's own keys (:func:`check_router`) and those that also read the
``router`` section or the path (:func:`router_errors`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vqmoe_megatron import registry
from vqmoe_megatron.config.checks import settled

if TYPE_CHECKING:
    from vqmoe_megatron.config.schema import ModelConfig, RunConfig

# Routers of one expert per token, and why.
TOP_1 = {
    "switch": "Switch sends a token to one expert",
    "hash": "a token id has one expert",
}
# Routers without a balance loss, and why. Megatron's default would be one, so they say so.
WITHOUT_BALANCE_LOSS = {
    "smoe_dropout": "its router is frozen, and a balance loss would move the hidden states instead",
    "hash": "nothing is learned that a balance loss could move",
    "loss_free": "its biases balance the load in the place of a loss",
}
ANY_LOSS = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
WITHOUT_LOGITS = {"hash": "there are no logits"}
OF_TOKEN_IDS = ("hash", "stable_moe")  # need the model's token ids in every layer


def check_router(model: ModelConfig) -> None:
    """Raise ``ValueError`` for settings of the model that its router rules out."""
    name, topk, loss = model.moe_router, model.moe_router_topk, model.moe_router_load_balancing_type
    if name in TOP_1 and topk != 1:
        raise ValueError(
            f"model.moe_router={name} with model.moe_router_topk={topk}: {TOP_1[name]}; use 1"
        )
    if name in WITHOUT_BALANCE_LOSS and loss != "none":
        raise ValueError(
            f"model.moe_router={name} with model.moe_router_load_balancing_type={loss}: "
            f"{WITHOUT_BALANCE_LOSS[name]}; use none"
        )
    if model.moe_router_freeze and name != "topk" and registry.is_ours("router", name):
        raise ValueError(
            f"model.moe_router_freeze=true with model.moe_router={name}: it stands for the "
            "release's top-k router, which never learns; use moe_router=topk, or leave it out"
        )
    if name in WITHOUT_LOGITS and model.moe_z_loss_coeff:
        raise ValueError(
            f"model.moe_router={name} with model.moe_z_loss_coeff={model.moe_z_loss_coeff}: "
            f"{WITHOUT_LOGITS[name]}; leave it out"
        )


def router_in_words(config: RunConfig) -> str:
    """How tokens choose experts; a few words for the user."""
    model, router, name = config.model, config.router, config.model.moe_router
    settings = router.for_run(name, model.num_moe_experts, config.train.train_iters)
    words = f"top-{model.moe_router_topk}"
    if name == "smoe_dropout":
        words = f"top-{settings.min_topk} growing to {words} in {settings.schedule_steps} steps"
    if name == "switch" and settings.capacity_factor is not None:
        words += f" up to a capacity of {settings.capacity_factor} T / N tokens"
    if name == "stable_moe" and settings.variant == "published":
        words += f" frozen by token id after {settings.stage_1_steps} steps"
    if name in ("x_moe", "stable_moe") and settings.variant != "published":
        words += f" ({settings.variant} variant)"
    return words if name == "topk" else f"{words} by moe_router={name}"


def other_router(config: RunConfig, what: str, advice: str) -> str | None:
    """Say that ``what`` is for Megatron's own router alone, where the layers have another of ours;
    None where they have it or none. ``advice`` follows."""
    name = config.model.moe_router
    has_router = config.vq.has_router(config.model.num_moe_experts)
    if not has_router or name == "topk" or not registry.is_ours("router", name):
        return None
    return (
        f"model.moe_router={name}: {what} knows moe_router=topk only, whose weights are one row "
        f"per expert; {advice}"
    )


def router_errors(config: RunConfig) -> Iterator[str]:
    """Yield every rule between ``router``, ``model`` and ``vq`` that the recipe breaks."""
    model, router, name = config.model, config.router, config.model.moe_router
    try:
        router.check_taken(name)
    except ValueError as error:
        yield str(error)
        return
    if config.vq.path == "filled" and name != "topk" and registry.is_ours("router", name):
        yield (
            f"vq.path=filled with model.moe_router={name}: it weighs experts by the top-k router's "
            "softmax over all of them; use moe_router=topk, or another path"
        )
    settings = router.for_run(name, model.num_moe_experts, config.train.train_iters)
    if name == "x_moe" and settled(settings.low_dim, "router.low_dim") > model.hidden_size:
        yield (
            f"router.low_dim <= model.hidden_size fails: {settings.low_dim} > {model.hidden_size}; "
            "it is the width of a subspace of the hidden vectors"
        )
    if name == "smoe_dropout":
        yield from _schedule_errors(config, settled(settings.min_topk, "router.min_topk"))
    if name == "stable_moe":
        yield from _stable_errors(config)


def _schedule_errors(config: RunConfig, min_topk: int) -> Iterator[str]:
    model = config.model
    if min_topk > model.moe_router_topk:
        yield (
            f"router.min_topk (default: num_moe_experts / 2) <= model.moe_router_topk fails: "
            f"{min_topk} > {model.moe_router_topk}; with moe_router=smoe_dropout the number of "
            "experts per token grows to moe_router_topk, as published to all "
            f"{model.num_moe_experts}"
        )
    if (eval_topk := config.router.eval_topk) is not None and eval_topk > model.num_moe_experts:
        yield (
            f"router.eval_topk <= model.num_moe_experts fails: {eval_topk} > "
            f"{model.num_moe_experts}"
        )


def _stable_errors(config: RunConfig) -> Iterator[str]:
    model, router = config.model, config.router
    if router.variant == "released":
        for name in ("stage_1_steps", "light_dim", "distill_coeff"):
            if getattr(router, name) != getattr(type(router), name):
                yield (
                    f"router.{name}={getattr(router, name)} with router.variant=released: the "
                    "release has one stage and no light router; use published, or leave it out"
                )
        return
    if model.moe_router_topk != 1:
        yield (
            f"model.moe_router=stable_moe with model.moe_router_topk={model.moe_router_topk}: a "
            "token has one expert, as published; use 1, or router.variant=released"
        )
    if model.moe_router_load_balancing_type not in ("aux_loss", "none"):
        yield (
            "model.moe_router=stable_moe with model.moe_router_load_balancing_type="
            f"{model.moe_router_load_balancing_type}: it has a balance loss of its own, over a "
            "microbatch; use aux_loss, or none"
        )
    if model.moe_z_loss_coeff:
        yield (
            f"model.moe_router=stable_moe with model.moe_z_loss_coeff={model.moe_z_loss_coeff}: "
            "its weights are sigmoids, without a softmax whose sum the z-loss keeps small; leave "
            "it out"
        )
