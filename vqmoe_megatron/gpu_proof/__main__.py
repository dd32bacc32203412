"""``python -m vqmoe_megatron.gpu_proof``: the command line of the proof.

Exits: 0 all asked parts passed, 1 one did not, 2 usage, 128 + signal number when it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vqmoe_megatron.gpu_proof.part import PARTS, choose_parts
from vqmoe_megatron.gpu_proof.proof import Request, run_proof

DEFAULT_OUT = Path("benchmarks/gpu")
DEFAULT_MINUTES = 20.0
EXIT_USAGE = 2


def main() -> int:
    """Read the command line and run the proof; return the exit code."""
    names = ", ".join(part.name for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m vqmoe_megatron.gpu_proof",
        description="Settle on one GPU what the CPU cannot show, part by part, within a budget.",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the results")
    parser.add_argument(
        "--budget-min", type=float, default=DEFAULT_MINUTES, help="minutes for all parts"
    )
    parser.add_argument("--parts", help=f"comma-separated: {names}; default: all")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="default: cuda where there is one"
    )
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does it run at all")
    parser.add_argument("--again", action="store_true", help="also parts that have passed")
    parser.add_argument("--wheels", type=Path, help="folder of gpu_proof.wheels, for packages")
    parser.add_argument("--fail", help="a part that is to fail: the others must go on")
    arguments = parser.parse_args()
    try:
        request = Request(
            out=arguments.out,
            parts=choose_parts(arguments.parts),
            budget_minutes=arguments.budget_min,
            device=arguments.device,
            is_tiny=arguments.tiny,
            again=arguments.again,
            wheels=arguments.wheels,
            failing=[part.name for part in choose_parts(arguments.fail)] if arguments.fail else [],
        )
        return run_proof(request)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
