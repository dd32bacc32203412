"""A recipe trains at the borders of its numbers' ranges, all of them at once."""

from __future__ import annotations

import math
from typing import get_origin

import pytest
from small_run import TINY, run_on

from vqmoe_megatron.config.declared_types import alternatives
from vqmoe_megatron.config.ranges import LEGAL_RANGES
from vqmoe_megatron.config.recipe import LEGAL_TYPES
from vqmoe_megatron.registry import is_ours, names, takes

pytestmark = pytest.mark.distributed

# What only another rule keeps from its lowest, or what would leave no step to look at.
BOUND = {
    "model.hidden_size": 4,  # grouped_mm: 16 bytes
    "model.moe_ffn_hidden_size": 4,
    "model.vocab_size": 256,  # the corpus's
    "optimizer.lr_decay_iters": 2,  # beyond the warm-up
    "train.train_iters": 2,
    "train.exit_interval": 2,
    "train.exit_duration_in_mins": 60,
    "checkpoint.keep_last": 1,
    "code_memory.num_rows": 8,  # one for each expert; 0 is none
}
# Of a path, quantizer or task that the recipe does not have; those of routers are below.
OF_ANOTHER = ("vq.num_fill_experts", "vq.fsq_levels", "vq.entropy_loss_coeff")
OF_OTHERS = ("router.", "finetune.", "vision.")
# What the numbers need beside them to be read at all.
READ = [
    "vq.quantizer=low_dim",
    "vq.expert_input=blend",
    "model.position_embedding_type=learned_absolute",
    "model.add_bias_linear=false",  # of the shared expert
    "code_memory.codes=embedding",
    "model.recompute_granularity=full",
    "model.recompute_method=block",
    "train.log_interval=1",
]
COSTLESS = ("model.rotary_base", "train.seed", "checkpoint.keep_last")
DRAWN = {"model.init_method_std": 0.02, "model.embedding_init_method_std": 0.02}
ALIVE = DRAWN | {"optimizer.lr": 1e-3, "model.seq_length": 8}


def lowest() -> dict[str, float]:
    """Each key at its lowest number; ``ema_decay`` and the like just above."""
    return {
        key: (1e-9 if legal.without_low else legal.low)
        for key, legal in LEGAL_RANGES.items()
        if key not in OF_ANOTHER and not key.startswith(OF_OTHERS)
    } | BOUND


def highest() -> dict[str, float]:
    """Each key that takes no memory or time, at its highest number or just below."""
    return {
        key: legal.high - 1e-6 if legal.without_high else legal.high
        for key, legal in LEGAL_RANGES.items()
        if (key in COSTLESS or float in alternatives(LEGAL_TYPES[key]))
        and key not in OF_ANOTHER
        and not key.startswith(OF_OTHERS)
    }


def is_list(key: str) -> bool:
    """Whether a recipe gives several of this number."""
    return any(get_origin(kind) is list for kind in alternatives(LEGAL_TYPES[key]))


# The highest weights and rate of learning are legal and diverge, which the trainer says.
STEADY = (
    highest()
    | DRAWN
    | {
        "optimizer.lr": 1e-3,
        "optimizer.min_lr": 0,
        "train.exit_interval": 2,
    }
)


@pytest.mark.parametrize(
    ("numbers", "beside"),
    [(lowest(), READ), ({**lowest(), **ALIVE}, READ), (STEADY, ["vq.expert_input=blend"])],
    ids=["lowest", "lowest, with weights and a rate", "highest, without divergence"],
)
def test_it_trains_at_the_borders(numbers, beside, ranks, small_corpus, tmp_path) -> None:
    written = {key: [value] if is_list(key) else value for key, value in numbers.items()}
    overrides = [*(f"{key}={value}" for key, value in written.items()), *beside]
    (result,) = run_on(ranks(1), small_corpus, tmp_path / "run", overrides, {})
    assert (result["state"], result["error"]) == ("completed", "")
    losses = [record["loss"] for record in result["records"] if "loss" in record]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert result["finite_codebooks"]


ROUTERS = [
    name
    for name in names("router")
    if is_ours("router", name)
    and any(f"router.{key}" in LEGAL_RANGES for key in takes("router", name))
]


@pytest.mark.full
@pytest.mark.parametrize("end", ["lowest", "highest"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_trains_at_the_borders_of_its_settings(router, end, ranks, small_corpus, tmp_path):
    """At its lowest numbers, and at the highest of those that take no memory."""
    every = [*TINY, "vq.path=continuous", f"model.moe_router={router}"]
    every += ["train.train_iters=20", "train.exit_interval=2", "model.moe_router_topk=1"]
    if router in ("smoe_dropout", "loss_free"):
        every.append("model.moe_router_load_balancing_type=none")
    for key in takes("router", router):
        legal = LEGAL_RANGES.get(f"router.{key}")
        if legal is None or (
            end == "highest" and float not in alternatives(LEGAL_TYPES[f"router.{key}"])
        ):
            continue
        number = legal.high if end == "highest" else (1e-9 if legal.without_low else legal.low)
        every.append(f"router.{key}={number}")
    if router == "smoe_dropout":
        every.append("router.min_topk=1")
    (result,) = run_on(ranks(1), small_corpus, tmp_path / "run", every, {})
    assert (result["state"], result["error"]) == ("completed", "")
    assert all(math.isfinite(r["loss"]) for r in result["records"] if "loss" in r)
