"""Checkpoints that one checkout wrote, continued by others: from the same bytes, the same curve."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkout import WRITTEN, Checkout
from kept_results import KeptResults
from run_files import observe_run
from training_curves import VARIANTS, pretrain

NUM_ITERATIONS, STOP_AFTER = 20, 10  # of the recipe, and of the writer
RUN, CORPUS = "continued/run", "continued/corpus"  # the same paths when written and continued


@dataclass(frozen=True)
class Continuation:
    """A variant of the layer, the layout that writes, and the one that goes on."""

    variant: str
    written_at: str
    continued_at: str

    @property
    def name(self) -> str:
        """As a row is named."""
        return f"{self.variant}, {self.written_at} -> {self.continued_at}"


CONTINUATIONS = (
    Continuation("dual", "EP2", "EP2"),
    Continuation("dual", "EP2", "TP2 x EP2 x ETP2"),
    Continuation("trained_codes", "1 rank", "1 rank"),
    Continuation("tokens", "EP2", "1 rank"),
    Continuation("product", "PP2 x VPP2", "PP2 x VPP2"),
)
QUICK_CONTINUATIONS = CONTINUATIONS[:1]


def written_run(writer: Checkout, kept: KeptResults, plan: Continuation) -> Path:
    """Return a folder with ``corpus`` and ``run``: stopped after ``STOP_AFTER`` iterations.

    Raises:
        RuntimeError: when the writer cannot do it.
    """
    name = f"{WRITTEN}{plan.variant} {plan.written_at}"
    if (folder := kept.directory(name)) is not None:
        return folder
    folder = writer.work / name.replace(" ", "_")
    if not folder.is_dir():
        shutil.copytree(writer.work / writer.corpus, writer.work / "continued" / "corpus")
        overrides = (*VARIANTS[plan.variant], f"train.exit_interval={STOP_AFTER}")
        if failures := pretrain(writer, RUN, CORPUS, plan.written_at, overrides):
            raise RuntimeError(f"{writer.path} wrote no checkpoint for {plan.name}: {failures[0]}")
        (writer.work / "continued").rename(folder)
        kept.keep_directory(name, folder)
    return folder


def observe_continuation(checkout: Checkout, written: Path, plan: Continuation) -> dict[str, Any]:
    """Continue a copy of ``written``; return the run directory from there on."""
    shutil.copytree(written, checkout.work / "continued")
    overrides = VARIANTS[plan.variant]
    if failures := pretrain(checkout, RUN, CORPUS, plan.continued_at, overrides):
        return {"failures": failures}
    found = observe_run(checkout, RUN, after_iteration=STOP_AFTER)
    if len(found["metric loss"]) != NUM_ITERATIONS - STOP_AFTER:
        found["failures"] = [f"{len(found['metric loss'])} iterations after the checkpoint"]
    return found
