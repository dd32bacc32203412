"""The formulas against the layer itself on real ranks: every collective, to the byte.

Collectives are counted where the layer calls them. What the formulas are told of the routing comes
from the experts of every rank's tokens, not from what was exchanged.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from tiny_layer import FFN, HIDDEN, NUM_EXPERTS, build_layer, draw_parameters

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.wire import RowTraffic, layer_terms, total_bytes

pytestmark = pytest.mark.distributed

TP, EP, ETP = (
    f"{name}_parallel_size" for name in ("tensor_model", "expert_model", "expert_tensor")
)
LAYOUTS = {
    "ep4": {EP: 4},
    "etp2": {ETP: 2},
    "ep2etp2": {EP: 2, ETP: 2},
    "tp2ep2": {TP: 2, EP: 2},
    "tp4ep2etp2": {TP: 4, EP: 2, ETP: 2},
}
TOPK = 2
BASE = {"init": "uniform", "num_codes": 10, "dead_code_threshold": 0.0}  # N does not divide K
LOW_DIM = {"quantizer": "low_dim", "code_dim": 4}
PRODUCT = {"num_code_slices": 4, "quantizer": "product"}
RESIDUAL = {"num_code_slices": 2, "quantizer": "residual"}
FSQ = {
    "quantizer": "fsq",
    "code_dim": 2,
    "fsq_levels": [5, 2],
    "freeze_codebook": True,
    "codebook_update": "gradient",
    "train_projection": True,
}
CASES = {
    "continuous": {"path": "continuous"},
    "tokens": {"execution": "tokens"},
    "tokens_product_group": {"execution": "tokens", "straight_through": "group", **PRODUCT},
    "tokens_without_gradient": {
        "execution": "tokens",
        "path": "discrete",
        "norm": "none",
        "straight_through": "none",
    },
    "code_space_none": {"path": "discrete", "straight_through": "none"},
    "code_space_identity": {"straight_through": "identity"},
    "code_space_token": {"straight_through": "token"},
    "code_space_token_product": {"straight_through": "token", **PRODUCT},
    "code_space_token_learned": {"straight_through": "token", "code_input": "learned", **PRODUCT},
    "code_space_group": {"path": "discrete", "straight_through": "group", **PRODUCT},
    "code_space_token_low_dim": {"straight_through": "token", **LOW_DIM},
    "code_space_low_dim_group": {"straight_through": "group", **LOW_DIM},
    "code_space_learned_low_dim": {"code_input": "learned", **LOW_DIM},
    "tokens_low_dim": {"execution": "tokens", **LOW_DIM},
    "tokens_residual_group": {"execution": "tokens", "straight_through": "group", **RESIDUAL},
    "code_space_residual": {"straight_through": "token", **RESIDUAL},
    "code_space_group_fsq": {"straight_through": "group", **FSQ},
    "table_per_step": {"straight_through": "token", "table_per_step": True},
    "filled": {"path": "filled"},
    "filled_detached": {"path": "filled", "fill_values": "detached"},
    "filled_direct": {"path": "filled", "fill_values": "direct", "num_codes": 4},
    "filled_table_per_step": {"path": "filled", "table_per_step": True},
    "table_per_step_group": {"straight_through": "group", "table_per_step": True, "norm": "shared"},
}
NUM_MICROBATCHES = 3


def count_all(cases: list[list]) -> list[dict]:
    """In a rank: :func:`count` of every case."""
    return [count(*case) for case in cases]


def count(vq_settings: dict, num_microbatches: int, dtype: str) -> dict:
    """In a rank: run microbatches through a layer; return what it sent and where its rows went."""
    from megatron.core import parallel_state

    vq = VQConfig(**vq_settings)
    dtype = getattr(torch, dtype)
    changes = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16}
    # fp32 before the cast, as in training: a codebook keeps the fp32, or fp64, that it is cast from
    parameters = {name: tensor.float() for name, tensor in draw_parameters(vq).items()}
    layer = build_layer(vq, parameters, moe_router_topk=TOPK, **changes).to(dtype)
    # Without context parallelism tp_cp has the ranks of tp, in a group of its own.
    groups = [("ep", layer.ep_group), ("expt_tp", layer.expt_tp_group), ("tp", layer.tp_group)]
    groups.append(("tp", layer.pg_collection.tp_cp))
    sent: list[list] = []
    is_backward = False

    def record(collective: str, group: object, num_bytes: int, factor: Fraction) -> None:
        (name,) = [name for name, of_layer in groups if of_layer is group]
        amount = num_bytes * factor
        if amount:
            sent.append([is_backward, collective, name, amount.numerator, amount.denominator])

    real = {
        name: getattr(torch.distributed, name)
        for name in (
            "all_to_all_single",
            "all_gather_into_tensor",
            "reduce_scatter_tensor",
            "all_reduce",
        )
    }

    def all_to_all_single(
        output, rows, output_split_sizes=None, input_split_sizes=None, group=None
    ):  # noqa: ANN001, ANN202
        own = rows.shape[0] // group.size()
        if input_split_sizes is not None:
            own = input_split_sizes[group.rank()]
        num_bytes = rows[own:].nbytes
        record("all_to_all", group, num_bytes, Fraction(1))
        return real["all_to_all_single"](
            output, rows, output_split_sizes, input_split_sizes, group=group
        )

    def all_gather_into_tensor(output, block, group=None):  # noqa: ANN001, ANN202
        record("all_gather", group, block.nbytes, Fraction(group.size() - 1))
        return real["all_gather_into_tensor"](output, block, group=group)

    def reduce_scatter_tensor(output, rows, group=None):  # noqa: ANN001, ANN202
        record("reduce_scatter", group, output.nbytes, Fraction(group.size() - 1))
        return real["reduce_scatter_tensor"](output, rows, group=group)

    def all_reduce(tensor, group=None):  # noqa: ANN001, ANN202
        factor = Fraction(2 * (group.size() - 1), group.size())
        record("all_reduce", group, tensor.nbytes, factor)
        return real["all_reduce"](tensor, group=group)

    counting = (all_to_all_single, all_gather_into_tensor, reduce_scatter_tensor, all_reduce)
    x = torch.randn(5, 2, HIDDEN).to(dtype).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        for function in counting:
            patch.setattr(torch.distributed, function.__name__, function)
        for _ in range(num_microbatches):
            is_backward = False
            output, _ = layer(x)
            is_backward = True
            output.float().square().sum().backward()
        layer.finish_table()
    with torch.no_grad():
        tokens = x.reshape(-1, HIDDEN)
        continuous = [] if layer.router is None else layer._select(x)[1].flatten().tolist()
        found = [p.assigner(tokens).experts.flatten() for p in layer.paths if p.is_discrete]
        discrete = found[0] if found else []
    return {
        "sent": sent,
        "continuous": continuous,
        "discrete": [int(expert) for expert in discrete],
        "place": [
            parallel_state.get_expert_data_parallel_rank(),
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_rank(),
        ],
    }


def traffic_of(found: list[dict], rank: int, paths: list[str], num_ranks: int) -> RowTraffic:
    """Rows of one rank, from the experts of all ranks' rows."""
    experts_per_rank = NUM_EXPERTS // num_ranks

    def rows_from_to(source: dict, owner: int) -> int:
        experts = [expert for path in paths for expert in source[path]]
        return sum(expert // experts_per_rank == owner for expert in experts)

    replica, place, shard = found[rank]["place"]
    peers = [other for other in found if other["place"][0] == replica]
    received: dict[int, int] = {}  # by shard of this rank's experts
    for other in peers:
        source_shard = other["place"][2]
        received[source_shard] = received.get(source_shard, 0) + rows_from_to(other, place)
    kept = rows_from_to(found[rank], place)
    sent = sum(rows_from_to(found[rank], owner) for owner in range(num_ranks)) - kept
    return RowTraffic(sent, received[shard] - kept, max(received.values()))


def shape_of(vq: VQConfig, sizes: dict[str, int], dtype: str) -> LayerShape:
    return LayerShape(
        vq=vq,
        num_local_tokens=10,
        hidden_size=HIDDEN,
        moe_ffn_hidden_size=FFN,
        num_moe_experts=NUM_EXPERTS,
        moe_router_topk=TOPK,
        bytes_per_element={"bfloat16": 2, "float32": 4}[dtype],
        expert_model_parallel_size=sizes.get(EP, 1),
        expert_tensor_parallel_size=sizes.get(ETP, 1),
        tensor_model_parallel_size=sizes.get(TP, 1),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_collective_of_the_layer_is_predicted(ranks, layout: str) -> None:  # noqa: ANN001
    sizes = LAYOUTS[layout]
    runs = []
    for name, changes in CASES.items():
        dtype = "bfloat16" if name.endswith(("_product", "_group", "_low_dim")) else "float32"
        num_microbatches = NUM_MICROBATCHES if changes.get("table_per_step") else 1
        runs.append([{**BASE, **changes}, num_microbatches, dtype])
    found = ranks(4).run(count_all, runs, layout=sizes)
    for index, (settings, num_microbatches, dtype) in enumerate(runs):
        vq = VQConfig(**settings)
        shape = shape_of(vq, sizes, dtype)
        for rank in range(4):
            compare([of_rank[index] for of_rank in found], rank, shape, num_microbatches)


def compare(found: list[dict], rank: int, shape: LayerShape, num_microbatches: int) -> None:
    in_code_space = shape.vq.in_code_space
    paths = ["continuous"] if in_code_space else ["continuous", "discrete"]
    num_ranks = shape.expert_model_parallel_size
    terms = layer_terms(
        shape,
        traffic_of(found, rank, paths, num_ranks),
        traffic_of(found, rank, ["discrete"], num_ranks),
    )
    predicted = [
        (term.is_backward, term.collective, term.axis, term.sent_bytes)
        for term in terms
        for _ in range(1 if term.is_once_per_step else num_microbatches)
        if term.sent_bytes
    ]
    counted = [
        (is_backward, collective, group, Fraction(numerator, denominator))
        for is_backward, collective, group, numerator, denominator in found[rank]["sent"]
    ]
    assert sorted(counted) == sorted(predicted), f"rank {rank} of {shape}"
    assert sum(term[3] for term in counted) == total_bytes(terms, num_microbatches) > 0
