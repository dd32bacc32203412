"""Sequences cut over context-parallel ranks: the same curve as on one rank, and across a resume."""

from __future__ import annotations

import pytest
from fast_tier import only
from small_run import TINY, run_on

pytestmark = pytest.mark.distributed

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
CP = "context_parallel_size"
SIX = ["train.train_iters=20", "train.exit_interval=6"]  # the schedule of the whole recipe
DISTRIBUTED = ["optimizer.use_distributed_optimizer=true"]
OVERLAP = [
    *DISTRIBUTED,
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
]
RECOMPUTE = [
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
]
TOP1 = ["model.moe_router_topk=1", "vq.path=continuous"]
ROWS = [*TOP1, "code_memory.num_rows=64", "code_memory.exchange=rows"]
VARIANTS = {
    "default": [*ROWS, "code_memory.layers=[1,3]"],  # what quickstart trains
    "dual": [],
    "top1": TOP1,
    "contexts": [
        *ROWS,
        "code_memory.codes=embedding",
        "code_memory.num_codes=128",
        "code_memory.num_context_codes=12",
        "code_memory.context_dim=8",
        "code_memory.freeze_after_steps=5",
    ],
    "hidden": [*ROWS, "code_memory.codes=hidden", "code_memory.num_codes=16"],
    "group": ["vq.straight_through=group"],
    "tokens": ["vq.execution=tokens", "vq.codebook_update=gradient"],
    "filled": ["vq.path=filled", "vq.threshold_routing=true", "model.moe_router_topk=1"],
    "learned": ["model.position_embedding_type=learned_absolute"],
    "per-token": ["model.calculate_per_token_loss=true"],
}
# Ranks, sizes, settings that change no result, and the variants of each.
ALL = tuple(VARIANTS)
MAIN = ("default", "dual", "top1")
LAYOUTS = {
    "cp2": (2, {CP: 2}, [], ALL),
    "cp2-ep2": (4, {CP: 2, EP: 2}, [], MAIN),
    "cp2-ep4-distributed-optimizer": (4, {CP: 2, EP: 4}, DISTRIBUTED, MAIN),
    "cp4": (4, {CP: 4}, [], ("dual", "default")),
    "tp2-cp2": (4, {TP: 2, CP: 2}, [], ("dual", "contexts")),
    "tp2-cp2-ep2": (4, {TP: 2, CP: 2, EP: 2}, [], ("default", "hidden", "per-token")),
    "pp2-cp2": (4, {PP: 2, CP: 2}, [], ("dual", "default")),
    "cp2-overlap": (2, {CP: 2}, OVERLAP, ("default",)),
    "cp2-recompute": (2, {CP: 2}, RECOMPUTE, ("default", "dual")),
}
CASES = {
    f"{layout}-{variant}": (layout, variant)
    for layout, (*_, variants) in LAYOUTS.items()
    for variant in variants
}
LIMIT = 1e-5


@pytest.fixture(scope="module")
def one_rank(ranks, stdlib_corpus, tmp_path_factory):
    """``one_rank(variant)``: the records of one rank."""
    found = {}

    def records(variant):
        if variant not in found:
            folder = tmp_path_factory.mktemp(variant)
            every = [*TINY, "train.eval_iters=1", *SIX, *of_tiny(variant)]
            found[variant] = run_on(ranks(1), stdlib_corpus, folder, every, {})[0]["records"]
        return found[variant]

    return records


def of_tiny(variant):
    """The variant's settings, for two layers."""
    return [setting.replace("[1,3]", "[1]") for setting in VARIANTS[variant]]


@pytest.mark.parametrize("name", only(CASES, "cp2-dual", "cp2-hidden", "cp2-ep2-default"))
def test_the_curve_is_that_of_one_rank(name, ranks, one_rank, stdlib_corpus, tmp_path):
    layout, variant = CASES[name]
    num_ranks, sizes, overrides, _ = LAYOUTS[layout]
    every = [*TINY, "train.eval_iters=1", *SIX, *of_tiny(variant), *overrides]
    results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path, every, sizes)
    for result in results:  # every rank: their gradient norms clip their own parameters
        check_curve(result["records"], one_rank(variant))
        assert result["streams"] == results[0]["streams"]
        assert result["codebooks"].items() <= (
            {n: h for other in results for n, h in other["codebooks"].items()}.items()
        )  # replicas of a layer are bit-equal


def check_curve(ours, theirs) -> None:
    assert [record["iteration"] for record in ours] == [0, 1, 2, 3, 4, 5, 6]
    for one, other in zip(ours, theirs, strict=True):
        compared = {"loss", "grad_norm", "val/loss", "moe/load_balancing_loss"} & set(other)
        assert compared
        for metric in compared:
            assert one[metric] == pytest.approx(other[metric], rel=LIMIT), metric
        for counted in ("vq/dead_codes", "moe/expert_load_imbalance", "code_memory/rows_in_use"):
            assert one.get(counted) == other.get(counted)


@pytest.mark.full
@pytest.mark.parametrize("variant", ["default", "dual"])
def test_a_run_goes_on_bit_by_bit_and_at_other_layouts(variant, ranks, small_corpus, tmp_path):
    """Two steps each: cut over two ranks, again, on one, cut beside expert parallelism."""
    every = [*TINY, *of_tiny(variant), *DISTRIBUTED, "train.train_iters=8"]

    def losses(results):
        return {r["iteration"]: r["loss"] for r in results[0]["records"] if r["iteration"]}

    stayed = losses(
        run_on(
            ranks(2),
            small_corpus,
            tmp_path / "stayed",
            [*every, "train.exit_interval=4"],
            {CP: 2},
        )
    )
    cut, moved = [*every, "train.exit_interval=2"], {}
    for num_ranks, sizes in ((2, {CP: 2}), (2, {CP: 2}), (1, {}), (4, {CP: 2, EP: 2})):
        moved |= losses(run_on(ranks(num_ranks), small_corpus, tmp_path / "moved", cut, sizes))
    assert {iteration: moved[iteration] for iteration in stayed} == stayed
    expected = losses(run_on(ranks(1), small_corpus, tmp_path / "one", every, {}))
    assert sorted(moved) == sorted(expected) == list(range(1, 9))
    for iteration, loss in expected.items():
        assert moved[iteration] == pytest.approx(loss, rel=LIMIT), iteration
