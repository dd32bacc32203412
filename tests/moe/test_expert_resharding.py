"""Experts and their optimizer moments move between layouts through real checkpoints.

Weights are cuts of whole tensors [N, ...], so each rank knows what it must find after a load.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fast_tier import covering, tiered
from tiny_layer import (
    ACTIVATIONS,
    NUM_EXPERTS,
    build_layer,
    draw_parameters,
    expert_slice,
    transformer_config,
)

from vqmoe_megatron.config import RunConfig, VQConfig

pytestmark = pytest.mark.distributed

TP, EP, ETP = (
    f"{name}_parallel_size" for name in ("tensor_model", "expert_model", "expert_tensor")
)
LAYOUTS = {
    "1rank": (1, {}),
    "ep2": (4, {EP: 2}),
    "etp2": (2, {ETP: 2}),
    "ep2etp2": (4, {EP: 2, ETP: 2}),
    "tp2etp2": (4, {TP: 2, ETP: 2}),
    "etp4": (4, {ETP: 4}),
}
VQ = VQConfig(
    num_codes=12, codebook_update="gradient", init="uniform", vq_loss_coeff=0.0, norm="none"
)


def run(ranks, layout: str, function, *args):  # noqa: ANN001, ANN201
    world_size, sizes = LAYOUTS[layout]
    return ranks(world_size).run(function, *args, layout=sizes)


def build_experts(kind: str, gated: bool):  # noqa: ANN201
    """In a rank: its experts, and their parameters by (name in GroupedExperts, local expert)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from vqmoe_megatron.moe import GroupedExperts

    config = transformer_config(gated_linear_unit=gated, activation_func=ACTIVATIONS["silu"])
    num_local = NUM_EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    if kind == "grouped":
        experts = GroupedExperts(num_local, config, pg_collection=get_default_pg_collection())
        named = [(n, i, p[i]) for n, p in experts.named_parameters() for i in range(num_local)]
        return experts, named
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = SequentialMLP(num_local, config, linears, pg_collection=get_default_pg_collection())
    named = []
    for name, parameter in experts.named_parameters():
        _, expert, linear, part = name.split(".")
        named.append((part + linear[-1], int(expert), parameter))
    return experts, named


def wanted(gated: bool) -> dict[str, torch.Tensor]:
    """In a rank: its cut of the drawn experts, fp32, by name."""
    drawn = draw_parameters(VQ, gated=gated)
    prefix = "experts."
    return {
        name.removeprefix(prefix): expert_slice(name, value).float()
        for name, value in drawn.items()
        if name.startswith(prefix)
    }


def save_experts(kind: str, gated: bool, to: str) -> None:
    from megatron.core import dist_checkpointing

    experts, named = build_experts(kind, gated)
    values = wanted(gated)
    for name, expert, parameter in named:
        parameter.data.copy_(values[name][expert])
    if torch.distributed.get_rank() == 0:
        Path(to).mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(experts.sharded_state_dict(prefix="e."), to)


def load_experts(kind: str, gated: bool, source: str) -> list[str]:
    """In a rank: the names of what did not arrive bit for bit."""
    from megatron.core import dist_checkpointing

    experts, named = build_experts(kind, gated)
    for _, _, parameter in named:
        parameter.data.fill_(float("nan"))
    # SequentialMLP's linear layers also list an _extra_state, which is always empty for them.
    state = experts.sharded_state_dict(prefix="e.")
    state = {name: value for name, value in state.items() if "_extra_state" not in name}
    loaded = dist_checkpointing.load(state, source)
    experts.load_state_dict({n.removeprefix("e."): v for n, v in loaded.items()}, strict=False)
    values = wanted(gated)
    return [n for n, expert, p in named if not torch.equal(p, values[n][expert])]


JOURNEYS = (
    ("grouped ep2", "grouped ep2etp2"),
    ("grouped etp2", "grouped ep2"),
    ("grouped tp2etp2", "grouped 1rank"),
    ("grouped 1rank", "grouped etp4"),
    ("grouped ep2etp2", "sequential etp2"),
    ("sequential tp2etp2", "grouped etp4"),
)
CASES = [(*journey, gated) for gated in (False, True) for journey in JOURNEYS]
GATED = [(*journey, number % 2 == 0) for number, journey in enumerate(JOURNEYS)]


@pytest.mark.parametrize(("saver", "loader", "gated"), tiered(CASES, GATED))
def test_experts_arrive_bit_for_bit(ranks, saver: str, loader: str, gated: bool, tmp_path) -> None:  # noqa: ANN001
    to = str(tmp_path / "checkpoint")
    kind, layout = saver.split()
    run(ranks, layout, save_experts, kind, gated, to)
    kind, layout = loader.split()
    assert run(ranks, layout, load_experts, kind, gated, to) == [[]] * LAYOUTS[layout][0]


def set_gradients(layer: torch.nn.Module, gated: bool, seed: int) -> None:
    """In a rank: its cuts of drawn gradients into DDP's buffers, as if reduced."""
    drawn = draw_parameters(VQ, gated=gated, seed=seed)
    for name, parameter in layer.named_parameters():
        value = drawn[name]
        parameter.main_grad.copy_(expert_slice(name, value) if "experts." in name else value)


def train_layer(gated: bool, distributed: bool, seeds: list[int], load: str, save: str) -> dict:
    """In a rank: one optimizer step per seed of the gradients, between a load and a save.

    An empty folder name leaves the load or the save out.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from vqmoe_megatron.engines.megatron.optimizer import build_optimizer
    from vqmoe_megatron.engines.megatron.optimizer_state import (
        OPTIMIZER_METADATA,
        prepare_for_loading,
        restore_adam_steps,
    )

    activation = ACTIVATIONS["silu"]
    drawn = {name: value.float() for name, value in draw_parameters(VQ, gated=gated).items()}
    layer = build_layer(VQ, drawn, gated_linear_unit=gated, activation_func=activation)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
    )
    model = DistributedDataParallel(layer.config, settings, layer)
    config = RunConfig()
    section = replace(config.optimizer, use_distributed_optimizer=distributed, lr=1e-2, min_lr=1e-2)
    optimizer, scheduler = build_optimizer(replace(config, optimizer=section), [model])
    scheduler.step(increment=10**6)  # past the warm-up

    def state(is_loading: bool) -> dict:
        sharded = layer.sharded_state_dict()
        moments = optimizer.sharded_state_dict(
            sharded, is_loading=is_loading, metadata=OPTIMIZER_METADATA
        )
        return {"layer": sharded, "optimizer": moments}

    with torch.no_grad():
        if load:
            prepare_for_loading(optimizer)
            loaded = dist_checkpointing.load(state(is_loading=True), load)
            layer.load_state_dict(loaded["layer"])
            optimizer.load_state_dict(loaded["optimizer"])
            restore_adam_steps(optimizer, 1)
    norms = []
    for seed in seeds:
        set_gradients(layer, gated, seed)
        norms.append(float(optimizer.step()[1]))
    if save:
        if torch.distributed.get_rank() == 0:
            Path(save).mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(state(is_loading=False), save)
    found = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    return {"norms": norms, "parameters": found}


def difference_from(whole: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """In a rank: the largest difference of parameters from its cuts of whole ones."""
    return max(
        float((value - (expert_slice(n, whole[n]) if "experts." in n else whole[n])).abs().max())
        for n, value in found.items()
    )


def train_and_compare(
    gated: bool, distributed: bool, load: str, whole: dict[str, torch.Tensor]
) -> dict:
    found = train_layer(gated, distributed, [102], load, "")
    return {"norms": found["norms"], "difference": difference_from(whole, found["parameters"])}


STEPS = [
    (*journey, gated, distributed)
    for journey in (("1rank", "tp2etp2"), ("etp2", "ep2"), ("ep2etp2", "etp2"))
    for gated in (False, True)
    for distributed in (False, True)
]


@pytest.mark.parametrize(
    ("saver", "loader", "gated", "distributed"), tiered(STEPS, covering(STEPS))
)
def test_a_step_after_resharding_is_that_of_one_rank(
    ranks,  # noqa: ANN001
    saver: str,
    loader: str,
    gated: bool,
    distributed: bool,
    tmp_path,  # noqa: ANN001
) -> None:
    """Steps and their norms: a shard counts on every rank, a replica of bias2 once."""
    (alone,) = run(ranks, "1rank", train_layer, gated, distributed, [101, 102], "", "")
    folder = str(tmp_path / "checkpoint")
    for found in run(ranks, saver, train_layer, gated, distributed, [101], "", folder):
        assert found["norms"] == pytest.approx(alone["norms"][:1], rel=1e-6)
    whole = alone["parameters"]
    for found in run(ranks, loader, train_and_compare, gated, distributed, folder, whole):
        assert found["norms"] == pytest.approx(alone["norms"][1:], rel=1e-6)
        assert found["difference"] < 1e-6
