"""Whether two checkouts behave the same, from the outside and to the last bit.

    git worktree add /tmp/before COMMIT
    python benchmarks/same_behaviour /tmp/before . --cache /tmp/same --markdown same.md

Runs the command ``vqmoe`` and the documented Python API of both checkouts (``PYTHONPATH`` selects
the code) and compares everything that is no time: training curves, routing and checkpoint tensors
of ``recipes/parity.yaml`` at several variants and layouts; curves continued from checkpoints that
OLD and every ``--writer`` wrote; bytes on the wire; help texts, recipe keys, plans, messages, exit
codes, files. Nothing inside the package is named, so files may move between the two.

``--cache`` keeps what OLD did under the name of its code, so that only NEW runs again. Exit code 0
when all is equal, 1 with a table of what differs, 2 when a checkout cannot be run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import surface
import training_curves as curves
from checkout import Checkout, CheckoutUnusable
from differences import Difference, differences
from kept_results import KeptResults
from report import as_json, as_markdown, difference_table
from situations import observe_signals, observe_situations, observe_tracking

ORIGIN = "import json; from vqmoe_megatron.bench.origin import origin; print(json.dumps(origin()))"
BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Scenario:
    """One thing to observe in both checkouts."""

    name: str
    observe: Callable[[Checkout], dict[str, Any]]


def scenarios(is_quick: bool, writers: list[tuple[Checkout, KeptResults]]) -> list[Scenario]:
    """Return what is compared, the quickest first."""
    found = [
        Scenario("help", surface.observe_help),
        Scenario("plans", surface.observe_plans),
        Scenario("python api", surface.observe_python_api),
        Scenario("prepare", surface.observe_prepare),
        Scenario("situations", observe_situations),
        Scenario("wire EP2", partial(surface.observe_layer_wire, layouts="ep2")),
    ]
    if not is_quick:
        found += [
            Scenario("signals", observe_signals),
            Scenario("tracking", observe_tracking),
            Scenario(
                "wire TP2 x EP2, ETP2", partial(surface.observe_layer_wire, layouts="etp2,tp2ep2")
            ),
        ]
    layouts = curves.QUICK_LAYOUTS if is_quick else tuple(curves.LAYOUTS)
    for layout in layouts:
        found.append(
            Scenario(f"wire of a step, {layout}", partial(surface.observe_step_wire, layout=layout))
        )
    for variant in curves.QUICK_VARIANTS if is_quick else curves.VARIANTS:
        for layout in layouts:
            observe = partial(curves.observe_curve, variant=variant, layout=layout)
            found.append(Scenario(f"curve {variant}, {layout}", observe))
    for plan in checkpoints.QUICK_CONTINUATIONS if is_quick else checkpoints.CONTINUATIONS:
        for number, (writer, kept) in enumerate(writers):
            name = f"checkpoint of {writer.code if number else 'OLD'}, {plan.name}"
            found.append(Scenario(name, partial(_continue, writer=writer, kept=kept, plan=plan)))
    return found


def _continue(
    checkout: Checkout, writer: Checkout, kept: KeptResults, plan: checkpoints.Continuation
) -> dict[str, Any]:
    written = checkpoints.written_run(writer, kept, plan)
    return checkpoints.observe_continuation(checkout, written, plan)


def observed(scenario: Scenario, checkout: Checkout) -> dict[str, Any]:
    """Observe, as it would come back from a file; an observation that breaks off is a failure."""
    try:
        return json.loads(json.dumps(scenario.observe(checkout)))
    except (OSError, LookupError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        return {"failures": [checkout.stable(f"{type(error).__name__}: {error}")]}
    finally:
        checkout.tidy()


def compare(
    scenario: Scenario, old: Checkout, new: Checkout, kept: KeptResults
) -> tuple[list[Difference], dict[str, Any]]:
    """Observe both; return the differences and a line about the scenario.

    What does not work in OLD is a difference too: nothing is equal to it.
    """
    seconds: dict[str, float | None] = {"old": None}
    if (before := kept.observation(scenario.name)) is None:
        started = time.perf_counter()
        before = observed(scenario, old)
        seconds["old"] = time.perf_counter() - started
        if not before.get("failures"):
            kept.keep_observation(scenario.name, before)
    started = time.perf_counter()
    after = observed(scenario, new)
    seconds["new"] = time.perf_counter() - started
    rows = differences(scenario.name, before, after)
    rows += [
        Difference(scenario.name, "works in OLD", failure, "", "")
        for failure in before.get("failures", [])
    ]
    summary = {
        "name": scenario.name,
        "num_compared": len(set(before) | set(after)),
        "num_different": len(rows),
        "different": [row.what for row in rows],
        **{f"{side}_seconds": value for side, value in seconds.items()},
    }
    return rows, summary


def main() -> int:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/same_behaviour",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="checkout whose behaviour is right")
    parser.add_argument("new", type=Path, help="checkout to judge")
    parser.add_argument(
        "--writer",
        type=Path,
        action="append",
        default=[],
        help="another checkout, whose checkpoints both must continue alike",
    )
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="runs both")
    parser.add_argument("--cache", type=Path, help="folder that keeps what OLD did")
    parser.add_argument("--quick", action="store_true", help="2 variants at 2 layouts")
    parser.add_argument("--only", metavar="TEXT", help="scenarios whose name contains it")
    parser.add_argument("--markdown", type=Path, help="file to write")
    parser.add_argument("--json", type=Path, help="file to write, with every difference")
    arguments = parser.parse_args()
    started = time.perf_counter()
    origin = subprocess.run(
        [arguments.python, "-c", ORIGIN], cwd=BENCHMARKS.parent, capture_output=True, text=True
    )
    if origin.returncode:
        print(f"error: {arguments.python}: {origin.stderr}", file=sys.stderr)
        return 2
    provenance = json.loads(origin.stdout)
    same = {k: v for k, v in provenance["machine"].items() if k != "load_average"}
    setting = json.dumps([same, provenance["versions"], _processor()])
    with tempfile.TemporaryDirectory(prefix="vqmoe_same_") as folder:
        try:
            sides = [
                Checkout(path, arguments.python, Path(folder) / str(number))
                for number, path in enumerate((arguments.old, arguments.new, *arguments.writer))
            ]
        except CheckoutUnusable as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        old, new, *others = sides
        for writer in others:
            if writer.code is None:
                print(
                    f"error: --writer {writer.path} has uncommitted changes; commit them, so that "
                    "its checkpoints have a name",
                    file=sys.stderr,
                )
                return 2
        kept = [KeptResults(arguments.cache, side, setting) for side in (old, *others)]
        writers = list(zip((old, *others), kept, strict=True))
        chosen = [
            scenario
            for scenario in scenarios(arguments.quick, writers)
            if arguments.only is None or arguments.only in scenario.name
        ]
        if not chosen:
            parser.error(f"--only {arguments.only}: no scenario has this in its name")
        if arguments.cache is not None and old.code is None:
            print(f"{old.path} has uncommitted changes: what it does is not kept", flush=True)
        rows: list[Difference] = []
        summaries = []
        for scenario in chosen:
            different, summary = compare(scenario, old, new, kept[0])
            rows += different
            summaries.append(summary)
            print(_line(summary), flush=True)
    result = {
        "old": old.commit or f"{old.path} (changed)",
        "new": new.commit or f"{new.path} (changed)",
        "machine": provenance["machine"],
        "versions": provenance["versions"],
        "is_quick": arguments.quick,
        "wall_seconds": time.perf_counter() - started,
        "scenarios": summaries,
    }
    for file, render in ((arguments.markdown, as_markdown), (arguments.json, as_json)):
        if file is not None:
            file.write_text(render(result, rows))
    print(*(difference_table(rows) if rows else ["all equal"]), sep="\n")
    return 1 if rows else 0


def _line(summary: dict[str, Any]) -> str:
    times = [summary[f"{side}_seconds"] for side in ("old", "new")]
    shown = ", ".join("kept" if value is None else f"{value:.0f} s" for value in times)
    counts = f"{summary['num_different']} of {summary['num_compared']} differ"
    names = ": " + ", ".join(summary["different"][:3]) if summary["different"] else ""
    return f"{summary['name']}: {counts} ({shown}){names}"


def _processor() -> str:
    """The processor's name: another one may add in another order."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    sys.exit(main())
