"""Accuracies of fine-tuning runs with Student's intervals over seeds, one row per mode.

A difference to the first mode is paired by seed: the same texts in the same order.
"""

from __future__ import annotations

from typing import Any

from vqmoe_megatron.finetune.runs import Finetuning, dev_scores, sizes_of
from vqmoe_megatron.study.report.intervals import seed_means


def table_rows(finetuning: Finetuning) -> list[dict[str, Any]]:
    """One object per mode, in the order asked for; every run of it is done."""
    by_mode: dict[str, list] = {}
    for run in finetuning.runs:
        by_mode.setdefault(run.mode, []).append(run)
    rows: list[dict[str, Any]] = []
    for mode, runs in by_mode.items():
        dev = {run.seed: dev_scores(run) for run in runs}
        row: dict[str, Any] = {"mode": mode, "vq_path": runs[0].config.vq.path}
        row |= {"seeds": list(dev), **sizes_of(runs[0].config, finetuning.layout)}
        row["dev"] = _scored([score["val/accuracy"] for score in dev.values()])
        row["dev_loss"] = [score["val/loss"] for score in dev.values()]
        if finetuning.has_test:
            row["test"] = _scored([run.test_scores()["val/accuracy"] for run in runs])
        if rows:
            row["minus_first_mode"] = {
                split: _scored(
                    [
                        ours - theirs
                        for ours, theirs in zip(
                            row[split]["values"], rows[0][split]["values"], strict=True
                        )
                    ]
                )
                for split in ("dev", "test")
                if split in row
            }
        rows.append(row)
    return rows


def _scored(values: list[float]) -> dict[str, Any]:
    (found,) = seed_means([values])
    return {"values": values, "mean": found.mean, "half_width_95": found.half_width}
