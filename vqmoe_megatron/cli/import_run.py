"""``vqmoe import``: the command, and what it prints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vqmoe_megatron.runtime.versions import check_versions

if TYPE_CHECKING:  # it imports torch, which a help text can do without
    from vqmoe_megatron.hf.import_run import HfImport


def import_run(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="directory as vqmoe export --hf left it")
    ],
    out: Annotated[Path, typer.Option(metavar="RUN_DIR", help="new run directory")],
) -> None:
    """Make a run directory of an export: it trains on at any layout, and exports again.

    Every tensor of the model, the iteration, the place in the data and the
    learning-rate schedule are those of the exported checkpoint; the optimizer
    starts anew. One process holds the whole model and its optimizer's state.

    Example: vqmoe import exports/quickstart --out runs/again
    """
    check_versions()
    from vqmoe_megatron.hf.import_run import import_hf

    for line in in_words(import_hf(folder, out), folder):
        print(line)


def in_words(written: HfImport, folder: Path) -> list[str]:
    """What was taken over, what starts anew, and the command that trains on."""
    anew = "the optimizer's moments and update counts, random states, the tracked run"
    if written.is_bf16:
        anew += "; fp32 main copies start as the bf16 weights"
    recipe = shlex.quote(str(written.checkpoint / "run_config.yaml"))
    lines = [
        f"{written.out}: iteration {written.iteration:,} of {folder}, {written.num_tensors:,} "
        "tensors of the model as they were",
        f"anew: {anew}",
    ]
    if written.iteration < written.train_iters:
        return [*lines, f"trains on by: vqmoe pretrain {recipe}"]
    return [
        *lines,
        f"its recipe ends here (train.train_iters={written.train_iters}); further by: vqmoe "
        f"pretrain {recipe} train.train_iters=N optimizer.lr_decay_iters={written.decay_iters}",
    ]
