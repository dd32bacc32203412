"""Which tokens a rank offers to replace dead codes, and that a loss that is off costs nothing."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from tiny_layer import HIDDEN, build_layer, draw_parameters

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.code_assigner import CodeAssigner


def places(
    num_candidates: int,
    num_local_tokens: int,
    rank: int,
    num_shards: int,
    num_ranks: int,
    number: int = 0,
    varies: bool = False,
) -> dict[int, int]:
    """Slot -> position in the shard, of one rank's microbatch."""
    shard = SimpleNamespace(rank=lambda: rank % num_shards, size=lambda: num_shards)
    replicas = SimpleNamespace(rank=lambda: rank, size=lambda: num_ranks)
    assigner = SimpleNamespace(
        pg_collection=SimpleNamespace(tp=shard, tp_dp_cp=replicas),
        num_candidates=num_candidates,
        codebook=SimpleNamespace(codes=torch.zeros(1)),
        config=SimpleNamespace(variable_seq_lengths=varies),
    )
    found = CodeAssigner._candidate_places(assigner, num_local_tokens, number)
    if found is None:
        return {}
    slots, positions = (part.tolist() for part in found)
    return dict(zip(slots, positions, strict=True))


@pytest.mark.parametrize(
    ("num_candidates", "num_shards"), list(product((1, 3, 8, 96), (1, 2, 3, 4)))
)
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_the_table_is_filled_by_microbatches_in_the_order_of_the_global_batch(
    num_candidates: int, num_shards: int, num_replicas: int
) -> None:
    for num_local_tokens, num_microbatches in product((1, 2, 5, 64), (1, 3)):
        num_tokens = num_local_tokens * num_shards
        wanted = {}  # slot -> microbatch of the global batch, shard, position
        for g in range(num_microbatches * num_replicas):
            num_offered = min(num_tokens, num_candidates - g * num_tokens)
            for j in range(num_offered):
                shard, local = divmod(j * num_tokens // num_offered, num_local_tokens)
                wanted[g * num_tokens + j] = (g, shard, local)
        found = {}
        for rank, number in product(range(num_shards * num_replicas), range(num_microbatches)):
            own = places(
                num_candidates,
                num_local_tokens,
                rank,
                num_shards,
                num_shards * num_replicas,
                number,
            )
            g = number * num_replicas + rank // num_shards
            assert not found.keys() & own.keys()  # tables are added up
            found |= {slot: (g, rank % num_shards, local) for slot, local in own.items()}
        assert found == wanted
        assert len(set(found.values())) == len(found)  # no token twice


def test_where_lengths_vary_only_the_first_microbatch_offers() -> None:
    assert len(places(9, 4, 0, 1, 2, varies=True)) == 4
    assert places(9, 4, 0, 1, 2, number=1, varies=True) == {}
    assert places(9, 4, 1, 1, 2, varies=True) == {}


def with_losses(update: str, coefficients: dict[str, float]) -> dict:
    """In a rank: what hangs on a layer's output, what is saved for it, and what it measures."""
    from vqmoe_megatron.moe import synchronize_codebooks

    vq = VQConfig(num_codes=12, codebook_update=update, init="uniform", **coefficients)
    layer = build_layer(vq, {n: p.float() for n, p in draw_parameters(vq).items()})
    x = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.nbytes) or t, lambda t: t
    ):
        output, _ = layer(x)
    left, names = [output.grad_fn], set()
    while left:
        node = left.pop()
        if node.name() not in names or node.next_functions:
            names.add(node.name())
            left += [following for following, _ in node.next_functions if following is not None]
    output.sum().backward()
    (statistics,) = synchronize_codebooks([layer])
    codes = layer.assigner.codebook.codes.grad
    return {
        "loss nodes": sorted(n for n in names if "QuantizationError" in n or "AuxLoss" in n),
        "saved": sum(saved),
        "measured": float(statistics.scalars["commitment_loss"]),
        "x": x.grad,
        "codes": None if codes is None else codes.clone(),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_loss_of_coefficient_0_is_off_and_only_measured(ranks, update: str) -> None:  # noqa: ANN001
    def found(**coefficients: float) -> dict:
        return ranks(1).run(with_losses, update, coefficients)[0]

    on, none, without = found(), found(vq_loss_coeff=0.0), found(commitment_coeff=0.0)
    assert on["loss nodes"] and not torch.equal(none["x"], on["x"])
    assert torch.equal(without["x"], none["x"])  # nothing pulls tokens
    if update == "ema":
        assert none["loss nodes"] == without["loss nodes"] == []
        assert none["saved"] == without["saved"] < on["saved"]
    else:
        assert torch.equal(without["codes"], on["codes"]) and on["codes"].any()
        assert not none["codes"].any()
    for other in (none, without):
        assert other["measured"] == on["measured"] > 0
