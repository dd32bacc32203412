"""Runs with the baseline routers: the same curve at every layout, bitwise after a stop."""

from __future__ import annotations

import pytest
from baseline_routers import CONTINUOUS, ROUTERS
from fast_tier import only, spread, tiered
from small_run import TINY, run_on

pytestmark = pytest.mark.distributed

TP, PP, EP, CP = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("expert_model_parallel_size", "context_parallel_size"),
)
VPP = "virtual_pipeline_model_parallel_size"
RECOMPUTE = [
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
]
OVERLAP = [
    "optimizer.use_distributed_optimizer=true",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
]
LAYOUTS = {
    "ep2": (2, {EP: 2}, []),
    "tp2-ep2": (4, {TP: 2, EP: 2}, []),
    "pp2-vpp2-recompute": (2, {PP: 2, VPP: 2}, RECOMPUTE),
    "cp2-ep2": (2, {CP: 2, EP: 2}, []),
    "overlap-dp2": (2, {}, OVERLAP),
}
SHORT = [*TINY, *CONTINUOUS, "train.train_iters=8", "train.exit_interval=6", "train.eval_iters=1"]
SHORT += ["model.num_layers=4", "train.eval_interval=3"]
STATEFUL = ("smoe_dropout", "loss_free", "stable_moe")


def same_curve(ours: list[dict], theirs: list[dict], rel: float) -> None:
    assert [record["iteration"] for record in ours] == [r["iteration"] for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        compared = {name for name in other if name.split("/")[0] in ("loss", "grad_norm", "val")}
        compared |= {name for name in other if name.startswith("moe/") and "layer" not in name}
        assert {"loss", "grad_norm"} <= compared or other["iteration"] == 0
        for name in compared:
            assert one[name] == pytest.approx(other[name], rel=rel, abs=1e-7), name


@pytest.fixture(scope="module")
def one_rank(ranks, tmp_path_factory):
    """Records of a router on one rank, trained once for every corpus and overrides."""
    found = {}

    def records(corpus, router: str, overrides=()) -> list[dict]:
        key = (corpus, router, *overrides)
        if key not in found:
            every = [*overrides, *ROUTERS[router]]
            (result,) = run_on(ranks(1), corpus, tmp_path_factory.mktemp(router), every, {})
            found[key] = result["records"]
        return found[key]

    return records


# Every router over two and over four ranks, and at two of the other three layouts.
SHORT_CASES = [(router, name) for name in ("ep2", "tp2-ep2") for router in ROUTERS]
SHORT_CASES += spread([*ROUTERS, *ROUTERS], ("pp2-vpp2-recompute", "cp2-ep2", "overlap-dp2"))


@pytest.mark.parametrize(
    "router, name",
    tiered(SHORT_CASES, [("switch", "cp2-ep2"), ("stable_moe", "pp2-vpp2-recompute")]),
)
def test_short_curves_are_those_of_one_rank(router, name, ranks, one_rank, small_corpus, tmp_path):
    num_ranks, layout, overrides = LAYOUTS[name]
    every = [*SHORT, *ROUTERS[router], *overrides]
    for result in run_on(ranks(num_ranks), small_corpus, tmp_path, every, layout):
        same_curve(result["records"], one_rank(small_corpus, router, SHORT), 1e-5)


@pytest.mark.parametrize("router", only(ROUTERS, "switch"))
def test_ten_steps_beside_codes_are_those_of_one_rank(
    router, ranks, one_rank, stdlib_corpus, tmp_path
):
    """This needs codes that are different vectors: of two equal ones rounding would choose
    (docs/experiments.md, 2026-11-30)."""
    few = ("train.global_batch_size=4", "train.train_iters=10")
    every = [*few, *ROUTERS[router]]
    for result in run_on(ranks(4), stdlib_corpus, tmp_path, every, {TP: 2, EP: 2}):
        same_curve(result["records"], one_rank(stdlib_corpus, router, few), 1e-5)


@pytest.mark.parametrize("router", only(STATEFUL, "stable_moe"))
def test_a_stopped_run_goes_on_bitwise(router, ranks, small_corpus, tmp_path):
    every = [*SHORT, *ROUTERS[router]]
    whole = run_on(ranks(2), small_corpus, tmp_path / "whole", every, {EP: 2})[0]["records"]
    cut = [*every, "train.exit_interval=3"]
    for _ in range(2):
        parts = run_on(ranks(2), small_corpus, tmp_path / "cut", cut, {EP: 2})[0]["records"]
    exact = {name: value for name, value in whole[-1].items() if "per_second" not in name}
    for name in ("loss", "grad_norm", "val/loss", *(n for n in exact if n.startswith("moe/"))):
        assert parts[-1][name] == whole[-1][name], name
    assert parts[-1]["iteration"] == 6


@pytest.mark.full
@pytest.mark.parametrize("router", ["x_moe", "hash", *STATEFUL])
def test_a_run_goes_on_at_another_layout(router, ranks, one_rank, small_corpus, tmp_path):
    whole = one_rank(small_corpus, router, SHORT)
    cut = [*SHORT, *ROUTERS[router], "train.exit_interval=3"]
    run_on(ranks(4), small_corpus, tmp_path / "cut", cut, {TP: 2, EP: 2})
    (moved, _) = run_on(ranks(2), small_corpus, tmp_path / "cut", cut, {PP: 2})
    same_curve(moved["records"], [r for r in whole if r["iteration"] > 3], 1e-5)
