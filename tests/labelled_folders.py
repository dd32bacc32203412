"""Small data sets for fine-tuning tests, and runs of their recipes."""

from __future__ import annotations

from pathlib import Path

from small_run import TINY, layout_overrides, run_on, train_here

# Four steps of parity's tiny model, with both paths, as a checkpoint to start from.
PRETRAINING = [*TINY, "train.train_iters=4", "optimizer.lr_warmup_iters=0", "train.eval_iters=2"]
TUNING = ["train.train_iters=6", "train.global_batch_size=4", "train.micro_batch_size=2"]
TUNING += ["train.log_interval=1", "train.eval_interval=0", "checkpoint.save_interval=3"]
TUNING += ["optimizer.lr=1e-2", "tracking.mlflow=false"]

GOOD = ("a fine film", "good", "a good and warm one", "fine acting , a good time")
BAD = ("a dull film", "bad", "a bad and cold one", "dull acting , a bad time")


def write_sst2(folder: Path) -> Path:
    """Texts of 3 to 25 bytes and two classes, as SST-2 lies on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{text}\t{label}"
        for pair in zip(GOOD, BAD, strict=True)
        for label, text in ((1, pair[0]), (0, pair[1]))
    ]
    for split, number in (("train", 8), ("dev", 6), ("test", 5)):
        (folder / f"{split}.tsv").write_text("\n".join(lines[:number]) + "\n")
    return folder


def pretrained(pool, corpus: Path, out: Path, *overrides: str) -> list[dict[str, float]]:
    """Train the checkpoint on every rank of ``pool``; return its records."""
    return run_on(pool, corpus, out, [*PRETRAINING, *overrides], {})[0]["records"]


def recipes_of(checkpoint: Path, data: Path, out: Path, modes: list[str], *overrides: str, **more):
    """The recipes of fine-tuning runs, written; seed 1 unless ``seeds`` says otherwise."""
    from vqmoe_megatron.finetune.runs import check_finetuning, write_recipes

    settings = [*TUNING, *overrides]
    seeds = more.pop("seeds", [1])
    todo = check_finetuning(checkpoint, "sst2", data, modes, seeds, settings, out, None)
    write_recipes(todo)
    return todo


def tune_on(pool, recipe: Path, out: Path, layout: dict[str, int], *overrides: str) -> dict:
    """Run one recipe on every rank of ``pool`` into ``out``; the first rank's results."""
    every = [f"train.output_dir={out}", *overrides, *layout_overrides(layout)]
    return pool.run(train_here, str(recipe), every, layout=layout)[0]


def losses(result: dict) -> list[float]:
    """Training loss of every step."""
    return [record["loss"] for record in result["records"] if "loss" in record]
