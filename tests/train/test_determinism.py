"""With train.deterministic two runs of one layout are equal to the last bit."""

from __future__ import annotations

import pytest
from small_run import TINY, run_on
from troubled_run import is_deterministic

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "num_ranks, layout",
    [(1, {}), pytest.param(2, {"tensor_model_parallel_size": 2}, marks=pytest.mark.full)],
    ids=["one", "tp2"],
)
def test_two_runs_are_equal_and_the_mode_is_really_on(
    num_ranks, layout, ranks, small_corpus, tmp_path
):
    every = [*TINY, "train.train_iters=8", "model.hidden_dropout=0.1", "train.deterministic=true"]
    every += ["vq.codebook_update=gradient", "optimizer.use_distributed_optimizer=true"]
    pool = ranks(num_ranks)
    try:
        first = run_on(pool, small_corpus, tmp_path / "first", every, layout)
        second = run_on(pool, small_corpus, tmp_path / "second", every, layout)
        assert pool.run(is_deterministic, layout=layout) == [True] * num_ranks
    finally:
        pool.close()  # the mode is for the whole process
    for ours, theirs in zip(first, second, strict=True):
        assert [(r["loss"], r["grad_norm"]) for r in ours["records"]] == [
            (r["loss"], r["grad_norm"]) for r in theirs["records"]
        ]
        assert ours["codebooks"] == theirs["codebooks"]
