"""Hit a real run of four ranks at random, start it again, until it was hit often enough.

    python tests/endurance/kill_rounds.py --rounds 50 --seed 1 --run-dir runs/killed \
        --corpus data/stdlib [--async-save]

1. A round starts ``vqmoe pretrain`` in the run directory, waits for a random moment (of start-up,
   of training, or inside a save) and hits it with one of ``ACTIONS``.
2. After every hit: the end is bounded, no process is left, exit code, ``status.json`` and the
   newest checkpoint are what they have to be, and the next start resumes from that checkpoint.
3. Then the run is left alone until it completes, and its metrics equal, to the last bit, those of a
   run that nobody hit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from kill_checks import Round, checkpoint_problems, curve_problems, outcome_problems  # noqa: E402
from killed_run import KilledRun  # noqa: E402

from vqmoe_megatron.bench.origin import origin  # noqa: E402
from vqmoe_megatron.track.metrics_log import read_metrics  # noqa: E402

ACTIONS = ("sigterm-one", "sigusr1-all", "kill-one", "kill-all-in-save")
NUM_RANKS = 4
LAYOUT = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}  # every kind of replica
MOST_ITERATIONS_PER_ROUND = 8  # of training before a hit; those on the way to one come on top
# So that the run is still going after the last round: measured 5 a round, kills go back.
FIRST_ITERATIONS, ITERATIONS_PER_ROUND = 20, 8
START_UP_SECONDS = 15.0  # of four ranks on two cores
SAVE_JITTER_SECONDS = 0.1
# From a hit to the end of every process. A stop request lets start-up, one step and a save finish;
# after a kill the other ranks get local_ranks.GRACE_SECONDS to notice.
STOP_LIMIT_SECONDS, KILL_LIMIT_SECONDS = 180.0, 40.0
ROUND_LIMIT_SECONDS = 300.0  # to reach the moment of a hit


def hit_rounds(
    run: KilledRun, num_rounds: int, seed: int, show: Callable[[Round], None]
) -> list[Round]:
    """Hit ``run`` in ``num_rounds`` starts; fewer when it completes before.

    Every block of ``len(ACTIONS)`` rounds has each action once, in random order.
    """
    rng = random.Random(seed)
    actions = _shuffled_blocks(rng)
    rounds = []
    try:
        while len(rounds) < num_rounds:
            current = Round(len(rounds) + 1, next(actions), run.newest_checkpoint())
            left_behind = set(run.saves_in_progress())
            run.start()
            started = time.monotonic()
            if not _reach_moment(run, current, rng, left_behind):
                break  # completed, or failed by itself: the caller sees which
            current.seconds_to_hit = time.monotonic() - started
            _hit(run, current, rng, left_behind)
            rounds.append(current)
            show(current)
    finally:
        run.end_all()
    return rounds


def _shuffled_blocks(rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(ACTIONS, len(ACTIONS))


def _reach_moment(
    run: KilledRun, current: Round, rng: random.Random, left_behind: set[Path]
) -> bool:
    """Wait for the random moment; False when the run ended before it."""
    if current.action != "kill-all-in-save" and rng.random() < 0.3:
        current.moment = "start-up"
        if not _wait(run, lambda: len(run.ranks()) == run.num_ranks):
            return False
        moment = time.monotonic() + rng.uniform(0.0, START_UP_SECONDS)
        if not _wait(run, lambda: time.monotonic() >= moment or run.is_training()):
            return False
        return len(run.ranks()) == run.num_ranks
    current.moment = "training"
    target = current.checkpoint_before + rng.randint(1, MOST_ITERATIONS_PER_ROUND)
    if not _wait(run, lambda: run.is_training() and run.last_iteration() >= target):
        return False
    if current.action == "kill-all-in-save":
        if not _wait(run, lambda: set(run.saves_in_progress()) - left_behind):
            return False
        time.sleep(rng.uniform(0.0, SAVE_JITTER_SECONDS))
    else:
        time.sleep(rng.uniform(0.0, 0.3))
    return len(run.ranks()) == run.num_ranks


def _wait(run: KilledRun, condition: Callable[[], object]) -> bool:
    """Poll closely, because a save is short; False when the run ended first."""
    deadline = time.monotonic() + ROUND_LIMIT_SECONDS
    while not condition():
        if run.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run does not get on:\n{run.log.read_text()[-3000:]}")
        time.sleep(0.005)
    return True


def _hit(run: KilledRun, current: Round, rng: random.Random, left_behind: set[Path]) -> None:
    """Send the signals, wait for the end of every process, and note how it ended."""
    ranks = run.ranks()
    victim = rng.choice(sorted(ranks))
    hit = time.monotonic()
    if current.action == "sigterm-one":
        ranks[victim].terminate()
    elif current.action == "sigusr1-all":
        for rank in ranks.values():
            rank.send_signal(signal.SIGUSR1)
    elif current.action == "kill-one":
        ranks[victim].kill()
    else:
        # Parent and ranks; writers that a rank has forked are left to end by themselves.
        for process in (psutil.Process(run.process.pid), *ranks.values()):
            process.kill()
        is_inside = bool(set(run.saves_in_progress()) - left_behind)
        current.moment = "inside a save" if is_inside else "after a save"
    limit = KILL_LIMIT_SECONDS if "kill" in current.action else STOP_LIMIT_SECONDS
    while run.process.poll() is None or run.processes():
        if time.monotonic() - hit > limit:
            left = [" ".join(process.cmdline()) for process in run.processes()]
            current.problems.append(f"still there after {limit} s: {left}")
            run.end_all()
            break
        time.sleep(0.02)
    current.seconds_to_end = time.monotonic() - hit
    current.exit_code = run.process.returncode
    current.last_iteration = run.last_iteration()
    try:
        current.checkpoint_after = run.newest_checkpoint()
        current.problems += outcome_problems(run, current, victim)
        current.problems += checkpoint_problems(run, current)
    except (ValueError, OSError) as error:  # a damaged or missing file of the run
        current.problems.append(str(error))


HEADINGS = (
    "round action moment checkpoint_before last_iteration checkpoint_after exit to_hit to_end"
)


def table_line(row: Round) -> str:
    """Return one line of the table, with what went wrong after it."""
    cells = [
        f"{row.number:>5} {row.action:<16} {row.moment:<13} {row.checkpoint_before:>17}",
        f"{row.last_iteration:>14} {row.checkpoint_after:>16} {row.exit_code:>4}",
        f"{row.seconds_to_hit:>5.1f}s {row.seconds_to_end:>5.1f}s",
    ]
    return " ".join([*cells, *(f"\n      PROBLEM: {problem}" for problem in row.problems)])


def main() -> None:
    """Run the rounds, complete the run, compare it with a whole one, and end with 1 if unequal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run-dir", type=Path, required=True, help="new; holds whole/ and killed/")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the summary")
    arguments = parser.parse_args()
    if arguments.run_dir.exists() and any(arguments.run_dir.iterdir()):
        parser.error(f"--run-dir {arguments.run_dir} is not empty")
    num_iterations = FIRST_ITERATIONS + ITERATIONS_PER_ROUND * arguments.rounds
    extra = [f"train.train_iters={num_iterations}"]
    if arguments.async_save:
        extra.append("checkpoint.async_save=true")
    folder, corpus = arguments.run_dir.resolve(), arguments.corpus.resolve()
    whole, killed = (
        KilledRun(folder / name, corpus, NUM_RANKS, LAYOUT, *extra) for name in ("whole", "killed")
    )

    started = time.monotonic()
    problems = whole.complete()
    whole_seconds = time.monotonic() - started
    print(f"{num_iterations} iterations without a hit: {whole_seconds:.0f} s\n{HEADINGS}")
    rounds = hit_rounds(
        killed, arguments.rounds, arguments.seed, lambda row: print(table_line(row), flush=True)
    )
    seconds_of_rounds = time.monotonic() - started - whole_seconds
    problems += killed.complete()
    problems += curve_problems(read_metrics(killed.dir), read_metrics(whole.dir))
    if killed.saves_in_progress():
        problems.append(f"left behind: {killed.saves_in_progress()}")
    if len(rounds) < arguments.rounds:
        problems.append(f"completed after {len(rounds)} hits")
    summary = {
        **origin(),
        "rounds": len(rounds),
        "seed": arguments.seed,
        "async_save": arguments.async_save,
        "iterations": num_iterations,
        "seconds_per_round": seconds_of_rounds / max(1, len(rounds)),
        "wall_seconds": time.monotonic() - started,
        "max_seconds_to_end": max((row.seconds_to_end for row in rounds), default=None),
        "hits": {action: sum(row.action == action for row in rounds) for action in ACTIONS},
        "hits_inside_a_save": sum(row.moment == "inside a save" for row in rounds),
        "problems": problems + [f"round {r.number}: {p}" for r in rounds for p in r.problems],
    }
    print(json.dumps(summary, indent=2))
    if arguments.json:
        whole_text = {**summary, "table": [asdict(row) for row in rounds]}
        arguments.json.write_text(json.dumps(whole_text, indent=2) + "\n")
    sys.exit(1 if summary["problems"] else 0)


if __name__ == "__main__":
    main()
