"""A model is trained on as many batches as the page says."""

from __future__ import annotations

import pytest
from analysis_job import adapted
from small_run import TINY, run_on

pytestmark = pytest.mark.distributed


def test_as_many_batches_as_were_asked_for_whatever_a_pass_reads(
    ranks, small_corpus, tmp_path
) -> None:
    short = [*TINY, "vq.path=continuous", "train.train_iters=2", "optimizer.lr_warmup_iters=0"]
    run_on(ranks(1), small_corpus, tmp_path / "run", short, {})
    found = ranks(1).run(adapted, str(tmp_path / "run"), str(small_corpus), 6)[0]
    assert [number for number, _ in found["points"]] == [0, 8, 16, 32, 48]
    assert found["num_batches"] == 6
