"""lm-evaluation-harness scores an export with its own ``hf`` model, as docs/operations.md says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import ROOT, TINY, run_on

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytestmark = [pytest.mark.distributed, pytest.mark.full]

OVERRIDES = [
    "vq.path=continuous",
    "code_memory.num_rows=64",
    "train.train_iters=4",
    "optimizer.lr_warmup_iters=0",
]
# With a choice shorter than the model's 16 tokens: one window each.
TEXTS = ["import os\n", "größer", "def f(x):"]
CHOICES = ["a", " in"]
NEWLINE = 10
TASKS = {
    "local_bits": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
}


def child(*words: object, **variables: str) -> None:
    env = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]


def nats(model, before: bytes, text: bytes) -> float:
    """Minus the log probability of ``text`` behind ``before``."""
    ids = torch.tensor([[*before, *text]])
    with torch.no_grad():
        scores = model(ids).logits.double().log_softmax(dim=-1)
    taken = scores[0, :-1].gather(1, ids[0, 1:, None])
    return -float(taken[len(before) - 1 :].sum())


def test_scores_are_those_of_the_model(ranks, small_corpus, tmp_path):
    from transformers import AutoModelForCausalLM

    run_on(ranks(1), small_corpus, tmp_path / "run", [*TINY, *OVERRIDES], {})
    folder = tmp_path / "hf"
    child("vqmoe_megatron.cli", "export", tmp_path / "run", "--hf", folder)
    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True).eval()
    better = [
        int(nats(model, text.encode(), CHOICES[1].encode())
            < nats(model, text.encode(), CHOICES[0].encode()))
        for text in TEXTS
    ]  # fmt: skip
    labels = [better[0], 1 - better[1], better[2]]  # the model is right in two of three

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [
        json.dumps({"text": text, "choices": CHOICES, "label": label})
        for text, label in zip(TEXTS, labels, strict=True)
    ]
    (tasks / "texts.jsonl").write_text("\n".join(lines) + "\n")
    for name, task in TASKS.items():
        files = f"dataset_kwargs: {{data_files: {{test: {tasks}/texts.jsonl}}}}"
        head = f"task: {name}\ndataset_path: json\n{files}\ntest_split: test"
        (tasks / f"{name}.yaml").write_text(head + task)
    arguments = f"pretrained={folder},trust_remote_code=True,prefix_token_id={NEWLINE}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    child(
        *("lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", ",".join(TASKS)),
        *("--include_path", tasks, "--device", "cpu", "--batch_size", 2),
        *("--output_path", tmp_path / "scores"),
        **offline,
    )
    (found,) = Path(tmp_path / "scores").rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    bits = sum(nats(model, b"\n", text.encode()) for text in TEXTS) / math.log(2)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    score = results["local_bits"]["bits_per_byte,none"]
    assert score == pytest.approx(bits / num_bytes, rel=1e-5)
    assert results["local_choice"]["acc,none"] == pytest.approx(2 / 3)
