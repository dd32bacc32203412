"""The smallest 64-expert recipe trains on two ranks, EP2: as it ships, but shorter."""

from __future__ import annotations

import pytest
from small_run import ROOT, train_here

pytestmark = pytest.mark.distributed

RECIPE = ROOT / "recipes" / "scale" / "tiny_64.yaml"


def test_64_experts_train_on_two_ranks(ranks, stdlib_corpus, tmp_path):
    overrides = [
        f"data.path={stdlib_corpus}",
        f"train.output_dir={tmp_path}",
        "train.exit_interval=8",
        "train.log_interval=1",
        "train.eval_iters=0",
        "optimizer.lr_warmup_iters=2",  # of 20, so that eight steps show
    ]
    layout = {"expert_model_parallel_size": 2}
    results = ranks(2).run(train_here, str(RECIPE), overrides, layout=layout)
    for result in results:
        assert (result["state"], result["error"]) == ("completed", "")
        losses = [record["loss"] for record in result["records"]]
        assert len(losses) == 8 and result["finite_codebooks"]
        assert losses[0] == pytest.approx(5.55, abs=0.1)  # ln 256, nothing learned yet
        assert losses[-1] < losses[0] - 1.0
    assert results[0]["codebooks"] == results[1]["codebooks"]
