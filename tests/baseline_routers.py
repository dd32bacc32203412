"""The baseline routers as tests train them: by name, the overrides of a recipe."""

from __future__ import annotations

CONTINUOUS = ["vq.path=continuous"]
NO_LOSS = "model.moe_router_load_balancing_type=none"
TOP_1 = "model.moe_router_topk=1"
# Every setting far enough from nothing that six steps show it.
ROUTERS = {
    "x_moe": ["model.moe_router=x_moe"],
    "x_moe-released": ["model.moe_router=x_moe", "router.variant=released", "router.low_dim=6"],
    "smoe_dropout": [
        *("model.moe_router=smoe_dropout", "model.moe_router_topk=8", NO_LOSS),
        *("router.min_topk=2", "router.schedule_steps=6", "router.eval_topk=3"),
    ],
    "hash": ["model.moe_router=hash", TOP_1, NO_LOSS],
    "switch": ["model.moe_router=switch", TOP_1, "router.capacity_factor=0.8"],
    "loss_free": ["model.moe_router=loss_free", NO_LOSS, "router.bias_update_rate=0.02"],
    "stable_moe": [
        *("model.moe_router=stable_moe", TOP_1, "model.moe_aux_loss_coeff=0.3"),
        *("router.stage_1_steps=4", "router.light_dim=6"),
    ],
    "stable_moe-released": ["model.moe_router=stable_moe", "router.variant=released"],
}
