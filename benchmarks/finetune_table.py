"""The table of a fine-tuning page: accuracies and costs of every mode, from finetune.json.

    vqmoe finetune runs/dual --task sst2 --data data/sst2 --out runs/sst2 --seeds 1,2,3 \
        --mode full,continuous,discrete,head
    python benchmarks/finetune_table.py runs/sst2/finetune.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = (
    "mode",
    "dev, %",
    "test, %",
    "test of each seed",
    "minus {first}, test, points",
    "trainable",
    "total",
    "active per token",
    "MFLOPs per token, forward",
    "of training",
)


def percent(scored: dict[str, Any], sign: str = "") -> str:
    """``mean +- half width`` of shares, times 100."""
    return f"{100 * scored['mean']:{sign}.1f} +- {100 * scored['half_width_95']:.1f}"


def cells(row: dict[str, Any]) -> list[str]:
    """One mode."""
    gap = row.get("minus_first_mode")
    return [
        f"`{row['mode']}`",
        percent(row["dev"]),
        percent(row["test"]),
        ", ".join(f"{100 * value:.1f}" for value in row["test"]["values"]),
        percent(gap["test"], "+") if gap else "",
        f"{row['trainable_parameters']:,}",
        f"{row['total_parameters']:,}",
        f"{row['active_parameters_per_token']:,}",
        f"{row['forward_flops_per_token'] / 1e6:.3f}",
        f"{row['training_flops_per_token'] / 1e6:.3f}",
    ]


def table(result: dict[str, Any]) -> str:
    """Markdown, a line per mode."""
    rows = result["rows"]
    head = [name.format(first=rows[0]["mode"]) for name in HEAD]
    lines = [head, ["---"] * len(head), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
