"""What the filled path records, keeps and refuses; its numbers are in test_layer_equality.py."""

from __future__ import annotations

import pytest
import torch
from dealt_microbatches import LAYOUTS, microbatches, own_microbatches
from tiny_layer import HIDDEN, NUM_EXPERTS, build_layer, draw_parameters

from vqmoe_megatron.config import VQConfig

pytestmark = pytest.mark.distributed

THRESHOLD = {"path": "filled", "num_codes": 6, "threshold_routing": True, "init": "uniform"}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


def built(settings: dict, **changes: object):  # noqa: ANN201
    """In a rank: an fp64 layer, so that no rounding moves a score into another bin."""
    vq = VQConfig(**{**THRESHOLD, **settings})
    return build_layer(vq, draw_parameters(vq), **changes)


def train_thresholds(settings: dict) -> list[dict]:
    """In a rank: what every step says and leaves; no optimizer."""
    from vqmoe_megatron.moe import synchronize_codebooks

    layer = built(settings)
    history = []
    for step in microbatches(4).double():
        for x in own_microbatches(step):
            layer(x)[0].sum().backward()
        (statistics,) = synchronize_codebooks([layer])
        names = ("exact_experts_per_token", "tokens_without_exact_expert", "routing_threshold")
        history.append(
            {name: float(statistics.scalars[name]) for name in names}
            | {"tau": float(layer.threshold.tau), "load": statistics.expert_load.tolist()}
        )
    return history


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tau_does_not_depend_on_the_layout_to_the_last_bit(layout: str, ranks) -> None:  # noqa: ANN001
    (alone,) = ranks(1).run(train_thresholds, {"num_fill_experts": 2})
    assert alone[0]["routing_threshold"] == 0.0 and alone[0]["exact_experts_per_token"] == 1.0
    assert len({step["tau"] for step in alone}) == 4
    assert any(step["tokens_without_exact_expert"] > 0 for step in alone)
    for step in alone:
        num_tokens = 4 * 6 * 2
        assert sum(step["load"]) == pytest.approx(num_tokens * step["exact_experts_per_token"])
    for rank in ranks(4).run(train_thresholds, {"num_fill_experts": 2}, layout=LAYOUTS[layout]):
        assert rank == alone


def steps_of(kind: str) -> dict[str, float]:
    """In a rank: one microbatch, run as ``kind`` says."""
    layer = built({}, **(RECOMPUTE if kind == "recompute" else {}))
    layer.threshold.tau.fill_(0.45)
    x = microbatches(1)[0, 0].double().requires_grad_()  # as behind an embedding
    if kind == "evaluation":
        layer.eval()
        layer(x)[0].sum().backward()
    elif kind == "no gradient":
        with torch.no_grad():
            layer(x)
    elif kind == "no backward":
        layer(x)
    else:
        layer(x)[0].sum().backward()
    if kind == "discarded":
        from vqmoe_megatron.moe import CodebookSync

        CodebookSync(applies_at_once=False, finalize=None).discard([layer])
    return {
        "tokens": float(layer.threshold.step_tokens[0]),
        "pairs by score": float(layer.threshold.step_scores.sum()),
        "codes": float(layer.assigner.codebook.step_count.sum()),
        "tau": float(layer.threshold.tau),
    }


@pytest.mark.parametrize(
    "kind", ["trained", "recompute", "evaluation", "no gradient", "no backward", "discarded"]
)
def test_statistics_are_recorded_once_per_trained_microbatch(kind: str, ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(steps_of, kind)
    assert found.pop("tau") == 0.45
    num_tokens = 12.0 if kind in ("trained", "recompute") else 0.0
    expected = {"tokens": num_tokens, "pairs by score": NUM_EXPERTS * num_tokens}
    assert found == expected | {"codes": num_tokens}


def outputs_at(tau: float) -> torch.Tensor:
    """In a rank: the output of an evaluation."""
    layer = built({"num_fill_experts": 0})
    layer.threshold.tau.fill_(tau)
    with torch.no_grad():
        return layer.eval()(microbatches(1)[0, 0].double())[0]


def test_an_evaluation_uses_the_stored_threshold(ranks) -> None:  # noqa: ANN001
    nobody, some, unset = (ranks(1).run(outputs_at, tau)[0] for tau in (1e6, 0.6, 0.0))
    assert not nobody.any()
    per_token = some.abs().sum(dim=-1) > 0
    assert 0 < int(per_token.sum()) < per_token.numel()
    assert (unset.abs().sum(dim=-1) > 0).all()


def learned_rows(layout: dict) -> dict:
    """In a rank: how they start, and what the optimizer and a checkpoint take them for."""
    layer = build_layer(VQConfig(path="filled", num_codes=6, fill_values="direct"))
    values = layer.fill_rows.values
    saved = layer.sharded_state_dict()["fill_rows.values"]
    return {
        "start": float(values.abs().max()),
        "shape": list(values.shape),
        "is_expert": not values.allreduce,
        "global": list(saved.global_shape),
        "offset": list(saved.global_offset),
        "replica": list(saved.replica_id),
    }


@pytest.mark.parametrize("layout", [{}, {"expert_model_parallel_size": 2}])
def test_learned_rows_are_cut_as_experts_are(layout: dict, ranks) -> None:  # noqa: ANN001
    results = ranks(2).run(learned_rows, layout, layout=layout)
    num_local = NUM_EXPERTS // (2 if layout else 1)
    for rank, found in enumerate(results):
        assert found["start"] == 0.0 and found["is_expert"]
        assert found["shape"] == [num_local, 6, HIDDEN]
        assert found["global"] == [NUM_EXPERTS, 6, HIDDEN]
        assert found["offset"] == [rank * num_local if layout else 0, 0, 0]
        assert found["replica"][-1] == (0 if layout else rank)


def refusal(settings: dict, changes: dict, is_own_router: bool) -> str:
    """In a rank: why such a layer is not built."""
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from tiny_layer import transformer_config

    from vqmoe_megatron.moe import GroupedExperts, VQMoELayer
    from vqmoe_megatron.moe.routers.topk import BalancedRouter

    experts = ModuleSpec(module=GroupedExperts)
    modules = MoESubmodules(experts=experts)
    if is_own_router:
        modules = MoESubmodules(experts=experts, router=BalancedRouter)
    try:
        vq = VQConfig(**{"path": "filled", **settings})
        VQMoELayer(transformer_config(**changes), modules, layer_number=1, vq=vq)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({}, {}, ""),
        (
            {},
            {"moe_router_topk": 2, "moe_router_pre_softmax": False},
            "does not do moe_router_pre_softmax=False: every expert is weighed by the softmax",
        ),
        (
            {"threshold_routing": True},
            {"moe_router_topk": 2},
            "does not do moe_router_topk=2: its threshold is held at one exact expert",
        ),
        ({}, {"moe_router_score_function": "sigmoid"}, "does not do moe_router_score_function"),
        ({}, {"moe_router_topk_scaling_factor": 2.0}, "does not do moe_router_topk_scaling"),
        ({}, {"moe_expert_capacity_factor": 1.0}, "codes have no capacity"),
        (
            {},
            {"moe_router_load_balancing_type": "sinkhorn", "moe_router_pre_softmax": True},
            "does not do moe_router_load_balancing_type=sinkhorn",
        ),
    ],
)
def test_settings_that_do_not_compose_are_refused(
    settings: dict,
    changes: dict,
    message: str,
    ranks,  # noqa: ANN001
) -> None:
    (said,) = ranks(1).run(refusal, settings, changes, True)
    assert message in said and bool(message) == bool(said)


def test_a_router_without_all_probabilities_is_refused(ranks) -> None:  # noqa: ANN001
    (said,) = ranks(1).run(refusal, {}, {}, False)
    assert "vq.path=filled needs the probabilities of all experts, which TopKRouter" in said
