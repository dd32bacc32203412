"""Step times of arms against each other: whole optimizer steps, in turns, in one process per rank.

    vqmoe prepare stdlib --out data/stdlib
    python benchmarks/step_ratio.py --json benchmarks/step_ratio.json
    python benchmarks/step_ratio.py --study recipes/studies/router_table.yaml --json out.json

Without a study the default is set beside plain mixtures of experts (step_ratio_arms.py). Every arm
is a recipe's model with its own engine on the same ranks and batches; a round takes one step of
each, in turning order, so that whatever the machine does meets all. Every rank has one thread.
Reported are ratios to the first arm, round by round: their median with a bootstrapped 95 %
interval. The ratio of the median times, which stand beside, may differ where the machine is busy.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from gloo_ranks import RankPool  # noqa: E402
from step_ratio_arms import Comparison, of_a_study, of_the_default  # noqa: E402
from step_ratio_rank import time_steps  # noqa: E402

from vqmoe_megatron.bench.origin import commit_in_words, origin  # noqa: E402
from vqmoe_megatron.rundir.atomic import replace_file  # noqa: E402


def measure(comparison: Comparison, corpus: Path, num_rounds: int) -> list[dict[str, Any]]:
    """One row per size and arm."""
    rows = []
    for size in comparison.sizes:
        arms = {arm: [*own, *size.layout_overrides] for arm, own in comparison.arms.items()}
        pool = RankPool(size.num_ranks)
        try:
            times = pool.run(
                time_steps,
                str(comparison.recipe),
                arms,
                str(corpus),
                num_rounds,
                layout={"expert_model_parallel_size": size.num_ranks},
                timeout_seconds=1800.0,
            )[0]
        finally:
            pool.close()
        first = next(iter(times.values()))
        for arm, of_arm in times.items():
            ratios = [a / b for a, b in zip(of_arm, first, strict=True)]
            low, high = interval(ratios)
            rows.append(
                {
                    "size": size.name,
                    "arm": arm,
                    "median_ms": statistics.median(of_arm),
                    "ratio": statistics.median(ratios),
                    "ratio_low": low,
                    "ratio_high": high,
                    "num_rounds": len(ratios),
                }
            )
            print(
                f"{size.name:32} {arm:24} {rows[-1]['median_ms']:8.1f} ms  x{rows[-1]['ratio']:.3f}"
            )
    return rows


def interval(values: list[float], num_draws: int = 2000) -> tuple[float, float]:
    """Bootstrapped 95 % interval of the median."""
    draw = random.Random(1)
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(num_draws)
    )
    return medians[int(0.025 * num_draws)], medians[int(0.975 * num_draws)]


def as_markdown(result: dict[str, Any]) -> str:
    """The same as a page."""
    machine, num_rounds = result["machine"], result["rows"][0]["num_rounds"]
    lines = [
        f"# {result['title']}",
        "",
        f"`python benchmarks/step_ratio.py {result['arguments']}`",
        f"at commit {commit_in_words(result)}, on {machine['cores']} cores with a load of "
        f"{machine['load_average']:.1f} at the start; one thread per rank.",
        f"{result['about']}; whole optimizer",
        f"steps of the arms in turns, {num_rounds} rounds. Ratio: median over rounds of a step's",
        f"time over that of {result['rows'][0]['arm']} in the same round. Last, the medians of the",
        "times themselves.",
        "",
        "| size | arm | ratio | 95 % | median ms |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['size']} | {row['arm']} | {row['ratio']:.3f} | {row['ratio_low']:.3f} - "
        f"{row['ratio_high']:.3f} | {row['median_ms']:.0f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the JSON file and a page beside it when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=ROOT / "data" / "stdlib")
    parser.add_argument("--study", type=Path, help="study file whose arms are timed")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    comparison = of_a_study(arguments.study) if arguments.study else of_the_default()
    result = {
        "title": comparison.title,
        "about": comparison.about,
        "arguments": shlex.join(sys.argv[1:]),
        **origin(),
        "rows": measure(comparison, arguments.corpus, arguments.rounds),
    }
    if arguments.json:
        replace_file(arguments.json, json.dumps(result, indent=2) + "\n")
        replace_file(arguments.json.with_suffix(".md"), as_markdown(result))


if __name__ == "__main__":
    main()
