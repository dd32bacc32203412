"""Settings of the routers beside Megatron's own: the baselines that VQMoE is compared to.

N experts, H hidden size. Which router takes which setting says the registry (``takes``); one that
the chosen router does not have must keep its default. Rules between a router and the model's
settings are in :mod:`vqmoe_megatron.config.router_rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from vqmoe_megatron import registry
from vqmoe_megatron.config.checks import check_choice, check_settings

VARIANTS = ("published", "released")
STAGE_1_SHARE = 10  # of stable_moe: a tenth of training


@dataclass(frozen=True)
class RouterConfig:
    """Settings of ``model.moe_router``, of those routers that have any."""

    variant: str = "published"  # x_moe, stable_moe: as its paper has it, or as VQMoE's release does
    low_dim: int | None = None  # x_moe: width of the space it scores in; null: N / 2
    initial_temperature: float = 0.3  # x_moe: of the softmax over cosines, then learned
    min_topk: int | None = None  # smoe_dropout: experts per token at the first step; null: N / 2
    schedule_steps: int | None = None  # smoe_dropout: until moe_router_topk; null: train_iters
    eval_topk: int | None = None  # smoe_dropout: at evaluation; null: as in training at that step
    capacity_factor: float | None = 1.25  # switch: of T / N tokens an expert; null: none drops
    bias_update_rate: float = 0.001  # loss_free: by which a step moves every expert's bias
    stage_1_steps: int | None = None  # stable_moe: until its routing is frozen; null: a tenth
    light_dim: int = 50  # stable_moe: width of the light router's word embeddings
    distill_coeff: float = 1.0  # stable_moe: weight of the light router's cross-entropy

    def __post_init__(self) -> None:
        check_settings("router", self)
        check_choice("router", "variant", self.variant, VARIANTS)

    def check_taken(self, router: str) -> None:
        """Raise ``ValueError`` for settings that the router of this name does not have."""
        if not registry.is_ours("router", router):
            return  # a package's reads what it likes
        takes = registry.takes("router", router)
        foreign = [
            f"router.{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name not in takes and getattr(self, field.name) != field.default
        ]
        if foreign:
            has = f"it takes {', '.join(sorted(takes))}" if takes else "it has no such settings"
            raise ValueError(
                f"{', '.join(foreign)} with model.moe_router={router}: {has}; leave the others out"
            )

    def for_run(self, router: str, num_experts: int, train_iters: int) -> RouterConfig:
        """These settings with every null that stands for a number filled in, of those that the
        router of this name takes."""
        takes = registry.takes("router", router) if registry.is_ours("router", router) else ()
        numbers = {
            "low_dim": max(1, num_experts // 2),
            "min_topk": max(1, num_experts // 2),
            "schedule_steps": train_iters,
            "stage_1_steps": max(1, train_iters // STAGE_1_SHARE),
        }
        unset: dict[str, Any] = {
            n: v for n, v in numbers.items() if n in takes and getattr(self, n) is None
        }
        return replace(self, **unset) if unset else self
