"""What the quickstart costs: time, memory, overhead, learning; and how fast `prepare` is.

    python benchmarks/quickstart_costs.py --json benchmarks/quickstart_costs.json

Runs the real commands in a temporary directory. Peak memory is the operating system's figure for
the largest rank; the corpus for `prepare` is real text (the standard library's source) repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from vqmoe_megatron.bench.origin import origin

ROOT = Path(__file__).resolve().parents[1]
PREPARE_SIZES_MB = (10, 100)


def run(*arguments: str) -> tuple[float, int]:
    """Run ``vqmoe ARGUMENTS``; return wall seconds and the peak RSS of the process, bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vqmoe_megatron.cli", *arguments],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"vqmoe {' '.join(arguments)} failed with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def write_standard_library_text(path: Path, num_bytes: int) -> None:
    """Write real source text, repeated to ``num_bytes``.

    Piece by piece: a child's peak memory starts at what its parent held when it was forked.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    with path.open("wb") as file:
        for source in itertools.cycle(files):
            left = num_bytes - file.tell()
            if left <= 0:
                break
            file.write(source.read_bytes()[:left])


def measure_prepare(folder: Path) -> list[dict[str, float]]:
    """Throughput and memory of the byte tokenizer at growing corpus sizes."""
    rows = []
    for size in PREPARE_SIZES_MB:
        source = folder / f"text{size}.txt"
        write_standard_library_text(source, size * 10**6)
        seconds, peak = run(
            "prepare", "text", "--input", str(source), "--out", str(folder / f"corpus{size}")
        )
        rows.append(
            {
                "corpus_bytes": size * 10**6,
                "wall_seconds": seconds,
                "megabytes_per_second": size / seconds,
                "peak_rss_bytes": peak,
            }
        )
    return rows


def measure_quickstart(folder: Path) -> dict[str, float]:
    """One whole quickstart run, read back from its own metrics."""
    run("prepare", "stdlib", "--out", str(folder / "stdlib"))
    run_dir = folder / "quickstart"
    seconds, _ = run(
        "pretrain",
        "recipes/quickstart.yaml",
        "--nproc",
        "2",
        f"data.path={folder / 'stdlib'}",
        f"train.output_dir={run_dir}",
    )
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in records if "loss" in record]
    shares = sorted(record["overhead_share"] for record in logged)
    validated = [record for record in records if "val/bits_per_byte" in record]
    return {
        "wall_seconds": seconds,
        "iterations": logged[-1]["iteration"],
        "peak_rss_bytes_largest_rank": logged[-1]["memory/peak_rss_bytes"],
        "overhead_share_median": shares[len(shares) // 2],
        "overhead_share_max": shares[-1],
        "val_bits_per_byte_before": validated[0]["val/bits_per_byte"],
        "val_bits_per_byte_after": validated[-1]["val/bits_per_byte"],
    }


def main() -> None:
    """Measure, print, and write the JSON file when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = {
            **origin(),
            "prepare": measure_prepare(Path(name)),
            "quickstart": measure_quickstart(Path(name)),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
