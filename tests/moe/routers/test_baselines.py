"""Each baseline router against its formula in plain torch: values and every gradient, fp64."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.distributed
SOFTMAX = 1e-5  # Megatron takes it in fp32
EXACT = 1e-12


def close(found: dict, tolerance: float, *with_gradient: str) -> None:
    assert found["values"] < tolerance and found["map"]
    assert set(with_gradient) <= set(found["gradients"]), found["gradients"]
    assert all(difference < tolerance for difference in found["gradients"].values()), found
    assert all(found["largest"][name] > 1e-3 for name in with_gradient), found["largest"]


# x_moe
def x_moe(variant: str, topk: int) -> dict:
    from router_in_a_rank import build, compare, states, top_k

    router = build("x_moe", {"variant": variant, "low_dim": 3}, moe_router_topk=topk)

    def oracle(x, w):  # noqa: ANN001, ANN202
        low, experts = x @ w["projection_weight"].t(), w["expert_weight"]
        scores = low @ (experts / experts.norm(dim=1, keepdim=True)).t()
        if variant == "published":
            scores = scores / low.norm(dim=1, keepdim=True) / w["temperature"]
        return scores.softmax(dim=1) * top_k(scores, topk), 0.0

    return compare(router, states(), oracle)


@pytest.mark.parametrize("variant", ["published", "released"])
def test_x_moe_is_its_formula(variant: str, ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(x_moe, variant, 2)
    weights = ["x", "projection_weight", "expert_weight"]
    close(found, SOFTMAX, *weights, *(["temperature"] if variant == "published" else []))
    assert set(found["per_token"]) == {2}


# smoe_dropout
def dropout() -> list:
    from router_in_a_rank import build, compare, states, top_k

    from vqmoe_megatron.moe.routers.smoe_dropout import topk_at

    settings = {"min_topk": 1, "schedule_steps": 3, "eval_topk": 2}
    router = build("smoe_dropout", settings, moe_router_topk=4)
    found = []
    for _ in range(5):
        k = router.topk

        def oracle(x, w, k=k):  # noqa: ANN001, ANN202
            scores = x @ w["weight"].t() + w["bias"]
            return scores.softmax(dim=1) * top_k(scores, k), 0.0

        found.append({"k": k, **compare(router, states(), oracle)})
        router.eval()
        found[-1]["eval"] = router.topk
        router.train()
        router.apply_parts(iter([]))
    state = router.state_dict()
    fresh = build("smoe_dropout", settings, moe_router_topk=4)
    fresh.load_state_dict(state)
    found.append([fresh.topk, fresh.num_steps, topk_at(50, 100, 8, 16), topk_at(0, 100, 8, 16)])
    return found


def test_smoe_dropout_grows_and_is_frozen(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(dropout)
    steps, loaded = found[:-1], found[-1]
    assert [step["k"] for step in steps] == [1, 2, 3, 4, 4]  # 1 + round(3 t / 3)
    assert [step["eval"] for step in steps] == [2] * 5
    for step in steps:
        close(step, SOFTMAX, "x")
        assert set(step["gradients"]) == {"x"}
        assert set(step["per_token"]) == {step["k"]}
    assert loaded == [4, 5, 12, 8]


def test_the_schedule_is_the_published_one() -> None:
    from vqmoe_megatron.moe.routers.smoe_dropout import topk_at

    for step in range(0, 130):
        exact = 8 + 8 * min(step, 100) / 100
        assert abs(topk_at(step, 100, 8, 16) - exact) <= 0.5
    assert topk_at(100, 100, 8, 16) == 16


# hash
def hashed() -> dict:
    from router_in_a_rank import VOCAB, B, S, build, states, token_ids
    from tiny_layer import NUM_EXPERTS

    router = build("hash", {}, with_tokens=True)
    ids = token_ids()
    router.tokens.begin(ids)
    probs, routing_map = router(states())
    table = router.expert_of_token
    other = build("hash", {}, with_tokens=True)
    other.set_layer_number(2)
    try:
        router(states()[:3])
        said = ""
    except ValueError as error:
        said = str(error)
    by_token = [[int(table[ids[b, s]]) for b in range(B)] for s in range(S)]
    return {
        "experts": probs.argmax(dim=1).tolist(),
        "expected": [expert for row in by_token for expert in row],
        "weights": probs.sum(dim=1).unique().tolist(),
        "map": bool((routing_map == (probs > 0)).all()),
        "counts": torch.bincount(table, minlength=NUM_EXPERTS).tolist(),
        "vocab": VOCAB,
        "differs": bool((other.expert_of_token != table).any()),
        "parameters": len(list(router.parameters())),
        "said": said,
    }


def test_hash_is_a_table_of_equal_shares(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(hashed)
    assert found["experts"] == found["expected"] and found["weights"] == [1.0] and found["map"]
    assert found["counts"] == [5, 5, 5, 5] and found["differs"]
    assert found["parameters"] == 0
    assert "sees [3, 2] tokens and was told token ids [12, 2]" in found["said"]


# switch
def switched(factor: float | None) -> dict:
    from router_in_a_rank import build, compare, states, top_k

    router = build("switch", {"capacity_factor": factor})

    def oracle(x, w):  # noqa: ANN001, ANN202
        probs = (x @ w["weight"].t() + w["bias"]).softmax(dim=1)
        chosen = top_k(probs, 1)
        if factor is not None:
            room = -(-int(probs.shape[0] * factor) // 4)
            for expert in range(4):
                asked = [t for t in range(probs.shape[0]) if chosen[t, expert]]
                for token in asked[room:]:
                    chosen[token, expert] = False
        return probs * chosen, 0.0

    found = compare(router, states(), oracle)
    found["dropped"] = router.step_dropped.tolist()
    return found


@pytest.mark.parametrize("factor", [None, 0.5, 1.0])
def test_switch_keeps_the_first_up_to_the_capacity(factor: float | None, ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(switched, factor)
    close(found, SOFTMAX, "x", "weight", "bias")
    assert set(found["per_token"]) == {1}
    if factor is None:
        assert found["dropped"] == [0, 0]
    else:
        assert 0 < found["dropped"][0] < found["dropped"][1] == 24


# loss_free
def loss_free() -> list:
    from router_in_a_rank import build, compare, states, top_k

    router = build("loss_free", {"bias_update_rate": 0.125}, moe_router_topk=2)
    bias = torch.zeros(4)
    found = []
    for _ in range(3):

        def oracle(x, w, bias=bias):  # noqa: ANN001, ANN202
            scores = (x @ w["weight"].t() + w["bias"]).sigmoid()
            return scores * top_k(scores + bias, 2), 0.0

        one = compare(router, states(), oracle)
        with torch.no_grad():
            probs, _ = oracle(states().flatten(0, 1), dict(router.named_parameters()))
        load = (probs > 0).sum(dim=0).float()
        one["load"] = bool((router.step_load == load).all())
        scalars = router.apply_parts(iter(router.local_parts()))
        router.clear_step()
        one["spread"] = float(scalars["expert_bias_spread"] - (bias.max() - bias.min()))
        bias = bias + 0.125 * torch.sign(load.mean() - load)
        one["bias"] = float((router.expert_bias - bias).abs().max())
        found.append(one)
    with torch.no_grad():
        router(states())
    found.append(router.step_load.sum().item())
    return found


def test_loss_free_moves_its_biases_against_the_load(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(loss_free)
    for step in found[:-1]:
        close(step, EXACT, "x", "weight", "bias")
        assert step["load"] and step["bias"] == 0 and step["spread"] == 0
    assert found[-1] == 0  # evaluation counts nothing


# stable_moe
def stable(stage: int) -> dict:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from router_in_a_rank import build, compare, states, token_ids, top_k

    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    router = build(
        "stable_moe",
        {"stage_1_steps": 1, "light_dim": 3, "distill_coeff": 0.7},
        with_tokens=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.3,
    )
    ids = token_ids()
    router.tokens.begin(ids)
    words = ids.t().flatten()
    if stage == 2:
        router.apply_parts(iter(router.local_parts()))

    def light(w):  # noqa: ANN001, ANN202
        return w["light_embedding_weight"][words] @ w["light_expert_weight"].t()

    def oracle(x, w):  # noqa: ANN001, ANN202
        scores = x @ w["weight"].t()
        chosen = top_k(light(w) if stage == 2 else scores, 1)
        probs = scores.sigmoid() * chosen
        if stage == 2:
            return probs, 0.0 * (w["light_embedding_weight"].sum() + w["light_expert_weight"].sum())
        loss = torch.zeros((), dtype=torch.float64)
        for expert in range(4):
            mine = scores[chosen[:, expert], expert].sigmoid()
            loss = loss + (len(mine) - 6) / 6 * mine.sum()
        log = light(w).log_softmax(dim=1)
        distil = -(log * chosen).sum(dim=1).mean()
        return probs, 0.3 * loss / 24 + 0.7 * distil

    found = compare(router, states(), oracle)
    router.eval()
    _, routing_map = router(states())
    found["eval"] = bool((routing_map == top_k(light(dict(router.named_parameters())), 1)).all())
    found["sums"] = router.step_light.tolist()
    with torch.no_grad():  # the optimizer goes on moving what is read no more
        router.light_embedding_weight.add_(5 * torch.randn(20, 3, dtype=torch.float64))
    found["same"] = bool((router(states())[1] == routing_map).all())
    state = router.state_dict()
    router.load_state_dict(state)
    found["frozen"] = router.is_frozen
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_stable_moe_learns_distils_and_freezes(stage: int, ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(stable, stage)
    distilled = ["light_embedding_weight", "light_expert_weight"] if stage == 1 else []
    close(found, EXACT, "x", "weight", *distilled)
    assert found["eval"] and found["frozen"] is (stage == 2)
    assert found["same"] is (stage == 2)
    assert found["sums"][2] == (24 if stage == 1 else 0)


def released() -> dict:
    from router_in_a_rank import build, compare, states, top_k

    router = build("stable_moe", {"variant": "released"}, moe_router_topk=2)

    def oracle(x, w):  # noqa: ANN001, ANN202
        scores = x @ (w["weight"] / w["weight"].norm(dim=1, keepdim=True)).t()
        return scores.softmax(dim=1) * top_k(scores, 2), 0.0

    return compare(router, states(), oracle)


def test_the_released_stable_moe_has_unit_experts(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(released)
    close(found, SOFTMAX, "x", "weight")
