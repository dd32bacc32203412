"""``vqmoe`` with the lengths of a documented run cut: for documented_pages.py.

Iterations are a tenth, samples short and few, and an analysis reads little. All runs of a page are
cut alike, so they go on from each other as on the page.
"""

from __future__ import annotations

import sys

TENTHS = {
    "train.train_iters": 40,  # of a recipe's own number, where the command gives none
    "checkpoint.save_interval": 20,
    "train.exit_interval": None,
    "train.check_replicas_interval": None,
    "optimizer.lr_decay_iters": None,
}
SMALL = {
    "model.seq_length": "32",
    "train.global_batch_size": "4",
    "train.micro_batch_size": "1",
    "train.eval_iters": "1",
    "train.eval_interval": "0",
    "train.log_interval": "1",
    "optimizer.lr_warmup_iters": "0",
    "tracking.mlflow": "false",
}
LITTLE = ("--num-tokens", "512", "--adapt-batches", "1", "--drift-steps", "2")  # of an analysis


def shortened(words: list[str]) -> list[str]:
    """The words of a command, a ``pretrain`` or an ``analyze`` with its lengths cut."""
    if words[:1] == ["analyze"]:
        return [*words, *LITTLE]
    if words[:1] != ["pretrain"]:
        return words
    kept, lengths = [], {key: value for key, value in TENTHS.items() if value}
    for word in words:
        key, _, value = word.partition("=")
        if key in TENTHS:
            lengths[key] = int(value)
        elif key not in SMALL:
            kept.append(word)
    cut = [f"{key}={max(1, value // 10)}" for key, value in lengths.items()]
    small = dict(SMALL)
    if any(word.startswith("recipes/vision/") for word in words):
        del small["model.seq_length"]  # the number of an image's patches
    return [*kept, *cut, *(f"{key}={value}" for key, value in small.items())]


if __name__ == "__main__":
    sys.argv[1:] = shortened(sys.argv[1:])
    from vqmoe_megatron.cli import main

    main()
