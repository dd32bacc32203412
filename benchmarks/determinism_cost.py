"""What ``train.deterministic`` costs: step times with and without it, in turns.

    vqmoe prepare stdlib --out data/stdlib
    python benchmarks/determinism_cost.py --json benchmarks/determinism_cost.json

Trains ``recipes/quickstart.yaml`` on two gloo ranks, by turns plain and deterministic in the same
processes, and compares medians over steps. Also says whether the curves repeat bit by bit: those of
each kind, and of one kind the other's (another algorithm may add in another, as fixed, order).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT / folder) for folder in (".", "tests", "benchmarks")
]  # also in the ranks, which import this file

from gloo_ranks import RankPool  # noqa: E402
from small_run import train_here  # noqa: E402

from vqmoe_megatron.bench.origin import origin  # noqa: E402

RECIPE = ROOT / "recipes" / "quickstart.yaml"
LAYOUT = {"expert_model_parallel_size": 2}
NUM_ITERATIONS, NUM_WARMUP = 24, 4
SETTINGS = [
    f"train.exit_interval={NUM_ITERATIONS}",
    "train.log_interval=1",
    "train.eval_iters=0",
    "tracking.mlflow=false",
]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("data/stdlib"))
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--turns", type=int, default=3, help="runs of each kind")
    arguments = parser.parse_args()
    times_ms: dict[str, list[float]] = {"plain": [], "deterministic": []}
    curves: dict[str, list[list[float]]] = {"plain": [], "deterministic": []}
    pool = RankPool(2)
    try:
        for _ in range(arguments.turns):
            for kind, all_times in times_ms.items():
                records = _train(pool, arguments.corpus.resolve(), kind == "deterministic")
                all_times += [record["step_time_ms"] for record in records[NUM_WARMUP:]]
                curves[kind].append([record["loss"] for record in records])
    finally:
        pool.close()
    medians = {kind: statistics.median(all_times) for kind, all_times in times_ms.items()}
    result = {
        **origin(),
        "recipe": RECIPE.name,
        "steps_of_each_kind": len(times_ms["plain"]),
        "median_step_ms": medians,
        "ratio": medians["deterministic"] / medians["plain"],
        "curves_repeat_bitwise": {
            kind: all(curve == of_kind[0] for curve in of_kind) for kind, of_kind in curves.items()
        },
        "both_kinds_agree_bitwise": curves["plain"][0] == curves["deterministic"][0],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


def _train(pool: RankPool, corpus: Path, is_deterministic: bool) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        every = [*SETTINGS, f"data.path={corpus}", f"train.output_dir={folder}/run"]
        every += [f"train.deterministic={str(is_deterministic).lower()}"]
        every += [f"parallel.{name}={size}" for name, size in LAYOUT.items()]
        results = pool.run(train_in_mode, str(RECIPE), every, is_deterministic, layout=LAYOUT)
    return results[0]["records"]


def train_in_mode(recipe: str, overrides: list[str], is_deterministic: bool) -> dict:
    """Run in the ranks: as ``train_here``, with the mode of an earlier turn taken back."""
    import torch

    torch.use_deterministic_algorithms(is_deterministic)
    return train_here(recipe, overrides)


if __name__ == "__main__":
    main()
