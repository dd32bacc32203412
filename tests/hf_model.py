"""An exported model in a process of its own, which knows nothing of this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

READER = """
import json, sys, torch
for hidden in ("vqmoe_megatron", "megatron", "omegaconf"):
    sys.modules[hidden] = None  # importing one is an error, as where they are not installed
from transformers import AutoModelForCausalLM

def answers(folder, asked):
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    unread = {kind: names for kind, names in loading.items() if names}
    assert not unread, unread
    model.eval()
    found = {"logits": model(asked["tokens"]).logits.float()}
    prompt, count = asked["tokens"][:, : asked["prompt"]], asked["count"]
    for name, use_cache in (("cached", True), ("uncached", False)):
        if use_cache and not asked["has_cache"]:
            continue
        found[name] = model.generate(
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            use_cache=use_cache, pad_token_id=0,
        )[:, prompt.shape[1]:]
    return found

with torch.no_grad():
    for line in sys.stdin:
        folder, asked, found = json.loads(line)
        torch.save(answers(folder, torch.load(asked, weights_only=True)), found)
        print("done", flush=True)
"""
PROMPT, COUNT = 5, 10


class Reader:
    """A process with transformers, one for many models: what takes long is to start it."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.num_asked = scratch, 0
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hf_home")}
        env |= {"OMP_NUM_THREADS": "1"}
        env.pop("PYTHONPATH", None)
        self.errors = scratch / "errors.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", READER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=scratch,
                env=env,
            )

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answers(
        self, folder: Path, tokens: torch.Tensor, has_cache: bool = True
    ) -> dict[str, torch.Tensor]:
        """fp32 logits of tokens ``[B, S]`` and greedy continuations of their first ``PROMPT``."""
        self.num_asked += 1
        asked, found = (self.scratch / f"{word}_{self.num_asked}.pt" for word in ("asked", "found"))
        torch.save(
            {"tokens": tokens, "prompt": PROMPT, "count": COUNT, "has_cache": has_cache}, asked
        )
        print(json.dumps([str(path) for path in (folder, asked, found)]), file=self.process.stdin)
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) != "done\n":
            assert line, self.errors.read_text()[-3000:]  # it has ended
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
