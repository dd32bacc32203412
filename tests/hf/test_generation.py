"""``vqmoe generate`` on a checkpoint and on its export."""

from __future__ import annotations

import pytest
from forked_vqmoe import vqmoe
from small_run import TINY, run_on

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.distributed

STEPS = [*TINY, "train.train_iters=8", "optimizer.lr_warmup_iters=0", "optimizer.lr=1e-2"]
MEMORY = ["vq.path=continuous", "code_memory.num_rows=64"]


def test_text_of_a_checkpoint_and_of_its_export(ranks, small_corpus, tmp_path):
    run_on(ranks(1), small_corpus, tmp_path / "run", [*STEPS, *MEMORY], {})
    assert vqmoe("export", tmp_path / "run", "--hf", tmp_path / "hf").returncode == 0
    few = ("--max-new-tokens", 9)
    first = vqmoe("generate", tmp_path / "run", "def f(", *few)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def f(") and len(first.stdout) > len("def f(\n")
    same = vqmoe("generate", tmp_path / "hf", "-", *few, text="def f(")
    assert same.stdout == first.stdout
    assert vqmoe("generate", tmp_path / "hf", "def f(", *few, "--seed", 2).stdout != first.stdout
    greedy = [vqmoe("generate", tmp_path / "hf", "def f(", *few, "--temperature", 0, "--seed", s)
              for s in (1, 2)]  # fmt: skip
    assert greedy[0].stdout == greedy[1].stdout
    empty = vqmoe("generate", tmp_path / "hf", "")
    assert empty.returncode == 2 and "at least one token" in empty.stderr
    (model,) = (tmp_path / "hf").glob("model-*.safetensors")
    model.write_bytes(model.read_bytes()[:-100])
    cut = vqmoe("generate", tmp_path / "hf", "def f(", *few)
    assert cut.returncode == 2 and "cannot be loaded" in cut.stderr
    nothing = vqmoe("generate", tmp_path / "nothing", "def")
    assert nothing.returncode == 2 and len(nothing.stderr.splitlines()) == 1
