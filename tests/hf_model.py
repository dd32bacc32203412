"""An exported model in a process of its own, which knows nothing of this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

READER = """
import sys, torch
for hidden in ("vqmoe_megatron", "megatron", "omegaconf"):
    sys.modules[hidden] = None  # importing one is an error, as where they are not installed
from transformers import AutoModelForCausalLM
folder, asked, found = sys.argv[1:]
asked = torch.load(asked, weights_only=True)
model, loading = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True
)
unread = {kind: names for kind, names in loading.items() if names}
assert not unread, unread
model.eval()
with torch.no_grad():
    answers = {"logits": model(asked["tokens"]).logits.float()}
    prompt, count = asked["tokens"][:, : asked["prompt"]], asked["count"]
    for name, use_cache in (("cached", True), ("uncached", False)):
        if use_cache and not asked["has_cache"]:
            continue
        answers[name] = model.generate(
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            use_cache=use_cache, pad_token_id=0,
        )[:, prompt.shape[1]:]
torch.save(answers, found)
"""
PROMPT, COUNT = 5, 10


def read_with_transformers(
    folder: Path, tokens: torch.Tensor, scratch: Path, has_cache: bool = True
) -> dict[str, torch.Tensor]:
    """fp32 logits of tokens ``[B, S]`` and greedy continuations of their first ``PROMPT``."""
    asked, found = scratch / "asked.pt", scratch / "found.pt"
    torch.save({"tokens": tokens, "prompt": PROMPT, "count": COUNT, "has_cache": has_cache}, asked)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf_home")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(folder), str(asked), str(found)],
        capture_output=True,
        text=True,
        cwd=scratch,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(found, weights_only=True)


def answers_of_megatron(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """In a rank: tokens of real text, the checkpoint's logits of them, its greedy continuations."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.train.preflight import check_run
    from vqmoe_megatron.train.stop_requests import StopRequests
    from vqmoe_megatron.train.trainer import Trainer

    config = load_recipe(Path(recipe), overrides)
    trainer = Trainer(check_run(config, 1, "cpu"), StopRequests({}))
    trainer.resume()
    model, length = trainer.model[0].eval(), config.model.seq_length
    text = IndexedDataset(str(Path(config.data.path) / "valid"))
    tokens = torch.cat([torch.as_tensor(text[i], dtype=torch.int64) for i in range(len(text))])
    tokens = tokens[: 4 * length].view(4, length)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        with torch.no_grad():
            return model(ids, positions, None).float()[..., : config.model.vocab_size or 256]

    ids = tokens[:, :PROMPT]
    for _ in range(COUNT):
        ids = torch.cat([ids, logits(ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return {"tokens": tokens, "logits": logits(tokens), "greedy": ids[:, PROMPT:]}
