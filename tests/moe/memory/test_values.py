"""A layer's rows: their start, their cut over owners, their place in checkpoints."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.distributed

EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
LAYOUTS = {"1": (1, {}), "ep4": (4, {EP: 4}), "etp4": (4, {ETP: 4}), "ep2": (4, {EP: 2}),
           "ep2etp2": (4, {EP: 2, ETP: 2})}  # fmt: skip


def build_values(is_input: bool, layer_number: int) -> dict:
    """In a rank: rows of 4 experts, and their place in a checkpoint as the 3rd of 5 layers."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from tiny_layer import transformer_config

    from vqmoe_megatron.moe.memory.row_plan import RowPlaces
    from vqmoe_megatron.moe.memory.values import RowValues

    groups = get_default_pg_collection()
    places = RowPlaces(32, 4, groups.ep.size(), groups.expt_tp.size())
    values = RowValues(transformer_config(), places, groups, is_input, seed=9)
    values.set_layer_number(layer_number)
    (part,) = values.sharded_state_dict("decoder.", ((0, 2, 5),)).values()
    return {
        "weight": values.weight.detach(),
        "forward": values().detach(),
        "global": [list(part.global_shape), list(part.global_offset), list(part.local_shape)],
        "replica": part.replica_id[2],
        "is_expert": values.weight.allreduce is False,
    }


def joined(results: list[dict]) -> torch.Tensor:
    whole = torch.full((4, 8, 16), torch.nan)
    for r in results:
        _, expert, row, _ = r["global"][1]
        experts, rows, _ = r["global"][2]
        whole[expert : expert + experts, row : row + rows] = r["weight"]
    return whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cut_and_named_alike_at_every_layout(layout: str, ranks) -> None:  # noqa: ANN001
    num_ranks, sizes = LAYOUTS[layout]
    results = ranks(num_ranks).run(build_values, True, 3, layout=sizes)
    (one,) = ranks(1).run(build_values, True, 3)
    assert torch.equal(joined(results), one["weight"])
    for r in results:
        assert r["is_expert"] and r["global"][0] == [5, 4, 8, 16] and r["global"][1][0] == 2
        assert torch.equal(r["forward"], r["weight"].flatten(0, 1))
    holders = [(tuple(r["global"][1]), r["replica"]) for r in results]
    assert len(set(holders)) == num_ranks  # of the replicas of a cut exactly one is the first
    assert {place for place, _ in holders} == {place for place, n in holders if n == 0}


def test_values_start_silent_and_inputs_as_normalised_states(ranks) -> None:  # noqa: ANN001
    (silent,) = ranks(1).run(build_values, False, 3)
    assert not silent["weight"].any()
    (inputs,) = ranks(1).run(build_values, True, 3)
    (of_another_layer,) = ranks(1).run(build_values, True, 4)
    assert float(inputs["weight"].std()) == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(inputs["weight"], of_another_layer["weight"])
    assert not torch.equal(inputs["weight"][0], inputs["weight"][1])
