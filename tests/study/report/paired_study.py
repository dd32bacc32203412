"""A written study of three arms at two sizes under four seeds, with losses a test chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from written_study import write_study

from vqmoe_megatron.study.report.run_table import ReportedStudy, read_study

SEEDS = (1, 2, 3, 4)
ARMS = ("smoe", "smoe_top2", "vq")


def run_name(experts: int, arm: str, seed: int) -> str:
    return f"experts{experts}-{arm}-ranks1-seed{seed}"


def paired_study(directory: Path, **changes) -> ReportedStudy:
    """The changes are those of ``write_study``."""
    settings = {"sizes": (4, 64), "routers": ARMS, "seeds": SEEDS} | changes
    return read_study(write_study(directory, **settings), "CPU")


def plant(study: ReportedStudy, bits: Mapping[tuple[int, str], tuple[float, ...]]) -> None:
    """Give the runs of (experts, arm) these bits per byte, by seed; one byte is one token."""
    by_name = {row.name: row for row in study.rows}
    for (experts, arm), values in bits.items():
        for seed, value in zip(SEEDS, values, strict=False):
            row = by_name[run_name(experts, arm, seed)]
            row.final_bits_per_byte, row.final_val_loss = value, value * math.log(2)
