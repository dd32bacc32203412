"""Sequences cut over context-parallel ranks: the same curve as on one rank, and across a resume."""

from __future__ import annotations

import pytest
from fast_tier import only
from small_run import run_on

pytestmark = pytest.mark.distributed

CP, TP, PP, EP = (f"{n}_parallel_size" for n in ("context", "tensor_model", "pipeline_model",
                                                 "expert_model"))  # fmt: skip
SIX = ["train.train_iters=20", "train.exit_interval=6"]  # the schedule of the whole recipe
TOP1 = ["model.moe_router_topk=1", "vq.path=continuous"]
DISTRIBUTED = ["optimizer.use_distributed_optimizer=true"]
VARIANTS = {
    # What quickstart trains: top-1 and a memory whose reads travel as rows.
    "default": [
        *TOP1,
        "code_memory.num_rows=64",
        "code_memory.layers=[1,3]",
        "code_memory.exchange=rows",
    ],
    "dual": [],
    "top1": TOP1,
}
LAYOUTS = {
    "cp2": (2, {CP: 2}, []),
    "cp2-ep2": (4, {CP: 2, EP: 2}, []),
}
LIMIT = 1e-5


@pytest.fixture(scope="module")
def one_rank(ranks, stdlib_corpus, tmp_path_factory):
    """By variant: the records of one rank."""
    found = {}

    def of(variant):
        if variant not in found:
            folder = tmp_path_factory.mktemp(variant)
            every = [*SIX, *VARIANTS[variant]]
            found[variant] = run_on(ranks(1), stdlib_corpus, folder, every, {})[0]["records"]
        return found[variant]

    return of


CASES = {f"{layout}-{variant}": (layout, variant) for layout in LAYOUTS for variant in VARIANTS}


@pytest.mark.parametrize("name", only(CASES, "cp2-dual", "cp2-ep2-default"))
def test_the_curve_is_that_of_one_rank(name, ranks, one_rank, stdlib_corpus, tmp_path):
    layout, variant = CASES[name]
    num_ranks, sizes, overrides = LAYOUTS[layout]
    every = [*SIX, *VARIANTS[variant], *overrides]
    results = run_on(ranks(num_ranks), stdlib_corpus, tmp_path, every, sizes)
    for result in results:
        check_curve(result["records"], one_rank(variant))


def check_curve(ours, theirs) -> None:
    assert [record["iteration"] for record in ours] == [0, 1, 2, 3, 4, 5, 6]
    for one, other in zip(ours, theirs, strict=True):
        compared = {"loss", "grad_norm", "val/loss", "moe/load_balancing_loss"} & set(other)
        assert compared
        for metric in compared:
            assert one[metric] == pytest.approx(other[metric], rel=LIMIT), metric
        for counted in ("vq/dead_codes", "moe/expert_load_imbalance", "code_memory/rows_in_use"):
            assert one.get(counted) == other.get(counted)
