"""GroupedExperts against Megatron's SequentialMLP: values, gradients, and one checkpoint format.

n = 2 local experts on each of P = 2 expert-parallel ranks, one of them without rows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_layer import ACTIVATIONS, FFN, HIDDEN, transformer_config

pytestmark = pytest.mark.distributed

COUNTS = [5, 0]
EP2 = {"expert_model_parallel_size": 2}


def build(kind: str, activation: str, gated: bool, bias: bool):  # noqa: ANN201
    """In a rank: this rank's experts, fp64, with random biases too."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from vqmoe_megatron.moe import GroupedExperts

    config = transformer_config(
        activation_func=ACTIVATIONS[activation], gated_linear_unit=gated, add_bias_linear=bias
    )
    groups = get_default_pg_collection()
    if kind == "grouped":
        experts = GroupedExperts(2, config, pg_collection=groups)
    else:
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = SequentialMLP(2, config, submodules, pg_collection=groups)
    return experts.double()


def draw(experts: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def stacked(experts: torch.nn.Module, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Parameters or gradients by GroupedExperts' names, from either kind."""
    found: dict[str, list] = {}
    for name, parameter in experts.named_parameters():
        value = parameter.grad if gradients else parameter.detach()
        if name.startswith("local_experts."):
            _, _, linear, part = name.split(".")
            found.setdefault(part + linear[-1], []).append(value)
        else:
            found[name] = list(value)
    return {name: torch.stack(values) for name, values in found.items()}


def evaluate(experts: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(sum(COUNTS), HIDDEN, generator=generator, dtype=torch.float64)
    probs = torch.rand(sum(COUNTS), generator=generator, dtype=torch.float64)
    rows.requires_grad_()
    probs.requires_grad_()
    output, bias = experts(rows, torch.tensor(COUNTS), probs)
    assert bias is None
    output.square().sum().backward()
    gradients = {f"gradient of {n}": g for n, g in stacked(experts, gradients=True).items()}
    return {"output": output.detach(), "rows": rows.grad, "probs": probs.grad, **gradients}


def shapes(experts: torch.nn.Module) -> dict[str, list[int]]:
    """Key -> global shape of everything a checkpoint would hold."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        LocalNonpersistentObject,
        ShardedObject,
        ShardedTensorFactory,
        apply_factories,
    )

    state = experts.sharded_state_dict(prefix="mlp.experts.")
    apply_factories(state)
    skipped = (LocalNonpersistentObject, ShardedObject, ShardedTensorFactory)
    return {v.key: list(v.global_shape) for v in nested_values(state) if not isinstance(v, skipped)}


def compare(activation: str, gated: bool, bias: bool) -> dict:
    grouped = build("grouped", activation, gated, bias)
    sequential = build("sequential", activation, gated, bias)
    draw(sequential)
    with torch.no_grad():
        for name, value in stacked(sequential).items():
            getattr(grouped, name).copy_(value)
    return {
        "grouped": evaluate(grouped),
        "sequential": evaluate(sequential),
        "grouped shapes": shapes(grouped),
        "sequential shapes": shapes(sequential),
    }


@pytest.mark.parametrize(
    ("activation", "gated", "bias"), [("gelu", False, False), ("silu", True, False)]
)
def test_equals_sequential_mlp(ranks, activation: str, gated: bool, bias: bool) -> None:  # noqa: ANN001
    for found in ranks(4).run(compare, activation, gated, bias, layout=EP2):
        assert set(found["grouped"]) == set(found["sequential"])
        for name, value in found["grouped"].items():
            other = found["sequential"][name]
            assert torch.allclose(value, other, rtol=1e-12, atol=1e-12), name
        assert found["grouped shapes"] == found["sequential shapes"]
        assert found["grouped shapes"]["mlp.experts.experts.linear_fc1.weight"][0] == 4


def save_and_load(
    saver: str, loader: str, activation: str, gated: bool, bias: bool, to: str
) -> dict:
    from megatron.core import dist_checkpointing

    source, target = (build(kind, activation, gated, bias) for kind in (saver, loader))
    draw(source)
    if torch.distributed.get_rank() == 0:
        Path(to).mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(source.sharded_state_dict(prefix="e."), to)
    # SequentialMLP's linear layers also list an _extra_state, which is always empty for them.
    wanted = target.sharded_state_dict(prefix="e.")
    wanted = {name: value for name, value in wanted.items() if "_extra_state" not in name}
    loaded = dist_checkpointing.load(wanted, to)
    loaded = {name.removeprefix("e."): value for name, value in loaded.items()}
    assert set(loaded) == {name for name, _ in target.named_parameters()}
    target.load_state_dict(loaded, strict=False)
    return {"source": stacked(source), "target": stacked(target)}


@pytest.mark.parametrize("direction", [("grouped", "sequential"), ("sequential", "grouped")])
@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("silu", True)])
def test_checkpoints_interchange(
    ranks,
    direction: tuple[str, str],
    activation: str,
    gated: bool,
    tmp_path: Path,  # noqa: ANN001
) -> None:
    to = str(tmp_path / "checkpoint")
    found = ranks(4).run(save_and_load, *direction, activation, gated, True, to, layout=EP2)
    # Replicas of an expert (ranks 0 and 2, 1 and 3) differ here; the first one's is saved.
    for rank, result in enumerate(found):
        for name, value in result["target"].items():
            assert torch.equal(value, found[rank % 2]["source"][name]), name


def refusal() -> str:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from vqmoe_megatron.moe import GroupedExperts

    config = transformer_config(moe_ffn_hidden_size=FFN + 1)
    try:
        GroupedExperts(2, config, pg_collection=get_default_pg_collection())
    except ValueError as error:
        return str(error)
    return "accepted"


def test_shares_of_unequal_size_are_refused(ranks) -> None:  # noqa: ANN001
    for message in ranks(4).run(refusal, layout={"expert_tensor_parallel_size": 2}):
        assert "moe_ffn_hidden_size % (ETP * 4 = 2 * 4) != 0: 49 % 8 = 1" in message
