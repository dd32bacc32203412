"""``vqmoe analyze``: what it refuses before a model is loaded, and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from images_run import VISION, prepare_digits
from small_run import ROOT, TINY, run_on

from vqmoe_megatron.analysis.analyze import check_request
from vqmoe_megatron.analysis.settings import Settings

pytestmark = pytest.mark.distributed

SHORT = [*TINY, "vq.path=continuous", "train.train_iters=2", "optimizer.lr_warmup_iters=0"]


def test_a_model_of_images_is_refused_first(ranks, tmp_path) -> None:
    digits = prepare_digits(tmp_path)
    run_on(ranks(1), digits, tmp_path / "run", [*SHORT, *VISION], {})
    with pytest.raises(ValueError, match="train.task=images; vqmoe analyze reads language models"):
        check_request([tmp_path / "run"], tmp_path / "page", Settings())


@pytest.mark.full
def test_json_is_all_that_is_printed(ranks, small_corpus, tmp_path) -> None:
    run_on(ranks(1), small_corpus, tmp_path / "run", SHORT, {})
    command = [sys.executable, "-m", "vqmoe_megatron.cli", "analyze", str(tmp_path / "run")]
    command += ["--json", "--out", str(tmp_path / "page"), "--parts", "load"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["parts"]) == ["load"]
