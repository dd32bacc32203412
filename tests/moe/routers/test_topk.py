"""Balance losses weigh the same however a batch is cut and wherever its parts are."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import PARITY, TINY, layout_overrides, train_here  # noqa: E402

pytestmark = pytest.mark.distributed

TP2 = {"tensor_model_parallel_size": 2}
# So strong that it is most of the gradient, and codes that do not depend on the first microbatch.
STRONG = ["model.moe_aux_loss_coeff=10", "vq.init=uniform", "vq.dead_code_threshold=0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    import sysconfig

    from vqmoe_megatron.data.prepare import prepare_corpus

    out = tmp_path_factory.mktemp("corpus") / "corpus"
    files = [Path(sysconfig.get_path("stdlib")) / "typing.py"]
    prepare_corpus("text", out, files, "byte", None, False, False)
    return out


def grad_norm(ranks, num_ranks, layout, corpus, run_dir, kind, *overrides) -> float:
    every = [*TINY, *STRONG, f"model.moe_router_load_balancing_type={kind}", *overrides]
    every += ["train.train_iters=8", "train.exit_interval=1", f"data.path={corpus}"]
    every += [f"train.output_dir={run_dir}", *layout_overrides(layout)]
    results = ranks(num_ranks).run(train_here, str(PARITY), every, layout=layout)
    return results[0]["records"][0]["grad_norm"]


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_per_token_and_per_microbatch_agree_when_all_tokens_count(kind, ranks, corpus, tmp_path):
    whole = ["train.micro_batch_size=4"]  # one microbatch: nothing is averaged
    per_token = [*whole, "model.calculate_per_token_loss=true"]
    norms = {
        name: grad_norm(ranks, num_ranks, layout, corpus, tmp_path / name, kind, *overrides)
        for name, (num_ranks, layout, overrides) in {
            "one": (1, {}, whole),
            "one_per_token": (1, {}, per_token),
            "tp2": (2, TP2, whole),
            "tp2_per_token": (2, TP2, per_token),
        }.items()
    }
    assert norms == {name: pytest.approx(norms["one"], rel=1e-5) for name in norms}


def test_the_global_loss_does_not_shrink_with_data_parallel_ranks(ranks, corpus, tmp_path):
    norms = [
        grad_norm(
            ranks,
            num_ranks,
            {},
            corpus,
            tmp_path / f"{num_ranks}_{per_token}",
            "global_aux_loss",
            f"train.micro_batch_size={4 // num_ranks}",
            f"model.calculate_per_token_loss={per_token}",
        )
        for num_ranks in (1, 2)
        for per_token in ("false", "true")
    ]
    assert norms == [pytest.approx(norms[0], rel=1e-5)] * 4


def balance_gradients(kind: str, topk: int, chooses: bool) -> dict:
    """In a rank: the router's gradient of its balance losses alone, fp32."""
    import torch
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from tiny_layer import HIDDEN, NUM_EXPERTS, transformer_config

    from vqmoe_megatron.moe.routers.topk import BalancedRouter

    config = transformer_config(
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=0.7,
        moe_z_loss_coeff=0.3,
        moe_router_topk=topk,
    )
    router = BalancedRouter(config, get_default_pg_collection())
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 2, HIDDEN, generator=generator)
    with torch.no_grad():
        router.weight.copy_(torch.randn(NUM_EXPERTS, HIDDEN, generator=generator))
        router.bias.copy_(torch.randn(NUM_EXPERTS, generator=generator))

    def most_likely(probs: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(probs, dtype=torch.bool)
        return chosen.scatter_(1, probs.topk(topk, dim=1).indices, True)

    probs, chosen = router(x, choose=most_likely) if chooses else router(x)
    (0.0 * probs.sum()).backward()
    return {"gradient": router.weight.grad, "bias": router.bias.grad, "chosen": chosen}


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_losses_of_chosen_pairs_are_megatrons_where_these_are_its_top_k(kind, topk, ranks):
    (theirs,) = ranks(1).run(balance_gradients, kind, topk, False)
    (ours,) = ranks(1).run(balance_gradients, kind, topk, True)
    assert (ours["chosen"] == theirs["chosen"]).all()
    for name in ("gradient", "bias"):
        assert float(theirs[name].abs().max()) > 1e-3
        assert float((ours[name] - theirs[name]).abs().max()) < 1e-6


def loss_of_any_pairs() -> list:
    """In a rank: the router's gradient of the balance loss of drawn pairs, and the formula's."""
    import torch
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from tiny_layer import HIDDEN, NUM_EXPERTS, transformer_config

    from vqmoe_megatron.moe.routers.topk import BalancedRouter

    config = transformer_config(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.7)
    router = BalancedRouter(config, get_default_pg_collection())
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 2, HIDDEN, generator=generator)
    chosen = torch.rand(12, NUM_EXPERTS, generator=generator) < 0.3
    probs, _ = router(x, choose=lambda probs: chosen)
    (0.0 * probs.sum()).backward()
    weight = router.weight.detach().clone().requires_grad_()
    p = (x.flatten(0, 1) @ weight.t() + router.bias.detach()).softmax(dim=1)
    loss = 0.7 * NUM_EXPERTS * (chosen.float().mean(dim=0) * p.mean(dim=0)).sum()
    return [router.weight.grad, torch.autograd.grad(loss, weight)[0], chosen.sum(dim=1)]


def test_the_loss_of_any_pairs_is_that_of_the_formula(ranks):
    ((ours, formula, per_token),) = ranks(1).run(loss_of_any_pairs)
    assert {0, 1, 2} <= set(per_token.tolist())
    assert float(formula.abs().max()) > 1e-3
    assert float((ours - formula).abs().max()) < 1e-6
