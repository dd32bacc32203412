"""The same training at every layout: the largest relative difference to one rank, as a table.

    vqmoe prepare stdlib --out data/stdlib
    python benchmarks/layout_matrix.py --corpus data/stdlib --json benchmarks/layout_matrix.json

Trains ``recipes/parity.yaml`` (fp32) at every layout and variant of ``layout_rows.py`` on real gloo
ranks, and compares each iteration's loss, global gradient norm and validation loss, as every rank
reports them, with the run of one rank. Writes the JSON file and the same as Markdown beside it,
anew after every layout. Exit code 1 when a cell exceeds ``LIMIT`` or did not run.

A token that is as near to one code as to another, to fp32 rounding, may change its code when a
layout sums in another order. A cell in which code usage or expert loads differ from those of one
rank says from which iteration on: ``first_flip``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gloo_ranks import RankPool, RanksFailed  # noqa: E402
from layout_difference import COMPARED, LIMIT, Cell, compare  # noqa: E402
from layout_rows import (  # noqa: E402
    CP,
    EP,
    ETP,
    LAYOUTS,
    OPTION_VARIANTS,
    PP,
    TP,
    VARIANTS,
    VPP,
    Layout,
)
from small_run import PARITY, layout_overrides, run_on  # noqa: E402

from vqmoe_megatron.bench.origin import commit_in_words, origin  # noqa: E402
from vqmoe_megatron.config.recipe import load_recipe  # noqa: E402
from vqmoe_megatron.plan.layout import check_layout  # noqa: E402

RECIPE_ITERATIONS = 20


class Worlds:
    """One world of ranks at a time: started when its size is first asked for, or after a crash."""

    def __init__(self) -> None:
        self._pool: RankPool | None = None

    def of(self, num_ranks: int) -> RankPool:
        """Return running ranks, ending those of another size."""
        if self._pool is None or self._pool.is_closed or self._pool.world_size != num_ranks:
            self.close()
            self._pool = RankPool(num_ranks)
        return self._pool

    def close(self) -> None:
        """End the ranks, if any."""
        if self._pool is not None:
            self._pool.close()


class Matrix:
    """Runs cells; the run of one rank is done once per variant and ``both`` settings."""

    def __init__(self, corpus: Path, num_iterations: int, work_dir: Path) -> None:
        self.corpus = corpus.resolve()
        self.work_dir = work_dir
        # Fewer iterations are the beginning of the recipe's schedule, not a shorter schedule.
        self.length = [
            f"train.train_iters={max(num_iterations, RECIPE_ITERATIONS)}",
            f"train.exit_interval={num_iterations}",
        ]
        self.worlds = Worlds()
        self.references: dict[tuple[str, ...], list[dict] | str] = {}  # records, or the error
        self.reference_seconds: list[float] = []

    def train(self, layout: Layout, settings: tuple[str, ...]) -> list[list[dict]]:
        """Return the records of every rank.

        Raises:
            ValueError: for a layout that is refused, before it costs the ranks their life.
            RanksFailed: when a rank fails.
        """
        overrides = [*self.length, *settings]
        config = load_recipe(PARITY, [*overrides, *layout_overrides(layout.sizes)])
        check_layout(config, layout.num_ranks, "cpu")
        run_dir = self.work_dir / "run"
        try:
            pool = self.worlds.of(layout.num_ranks)
            results = run_on(pool, self.corpus, run_dir, overrides, layout.sizes)
        finally:
            shutil.rmtree(run_dir, ignore_errors=True)
        for rank, result in enumerate(results):
            if result["error"]:
                raise ValueError(f"rank {rank}: {result['error']}")
        return [result["records"] for result in results]

    def add_references(self, variants: dict[str, list[str]]) -> None:
        """Run one rank for all ``variants`` of layouts first, so that its world starts once."""
        for both, variant in dict.fromkeys(
            (LAYOUTS[name].both, variant) for name in variants for variant in variants[name]
        ):
            started = time.perf_counter()
            settings = (*VARIANTS[variant], *both)
            try:
                self.references[settings] = self.train(Layout(1), settings)[0]
            except (ValueError, RanksFailed) as error:
                self.references[settings] = f"the run of one rank: {error}"
            seconds = time.perf_counter() - started
            self.reference_seconds.append(seconds)
            print(f"one rank: {' '.join((variant, *both))}: {seconds:.1f} s", flush=True)

    def cells(self, name: str, variants: list[str]) -> Iterator[Cell]:
        """Run one layout; a cell that does not run says why."""
        layout = LAYOUTS[name]
        self.worlds.of(layout.num_ranks)
        for variant in variants:
            started = time.perf_counter()
            cell = Cell(name, variant, 0.0)
            settings = (*VARIANTS[variant], *layout.both)
            expected = self.references[settings]
            try:
                if isinstance(expected, str):
                    raise ValueError(expected)
                compare(cell, self.train(layout, (*settings, *layout.settings)), expected)
            except (ValueError, RanksFailed) as error:
                cell.error = str(error)
            cell.seconds = time.perf_counter() - started
            yield cell


HEADINGS = ("layout", "ranks", "TP", "PP", "VPP", "CP", "EP", "ETP", "DP", "options", "loss",
            "grad_norm", "val loss", "worst variant", "flips")  # fmt: skip


def table_row(name: str, cells: list[Cell]) -> list[str]:
    """Return one row of the table: a layout's worst cell per metric."""
    layout = LAYOUTS[name]
    sizes = [layout.num_ranks, *(layout.size(key) for key in (TP, PP, VPP, CP, EP, ETP))]
    row = [name, *(str(size) for size in (*sizes, layout.data_parallel_size)), layout.options]
    if failed := [cell for cell in cells if cell.error is not None]:
        return [*row, *["error"] * 3, f"{failed[0].variant}: {failed[0].short_error}", "-"]
    worst = max(cells, key=lambda cell: max(cell.loss, cell.grad_norm))
    figures = [f"{max(getattr(cell, metric) for cell in cells):.1e}" for metric in COMPARED]
    num_flipped = sum(cell.first_flip is not None for cell in cells)
    return [*row, *figures, worst.variant, f"{num_flipped} of {len(cells)}"]


def table_lines(cells: dict[str, list[Cell]]) -> list[str]:
    """Return the Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in table_row(name, cells[name])] for name in cells]
    return [
        f"| {' | '.join(HEADINGS)} |",
        "|" + "---|" * len(HEADINGS),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def markdown(result: dict[str, Any], cells: dict[str, list[Cell]]) -> str:
    """Return the table with its origin."""
    machine, versions = result["machine"], result["versions"]
    return f"""# The same training at every layout

`recipes/parity.yaml`, fp32, {result["num_iterations"]} iterations: largest relative difference to
one rank, over these variants of the layer (`benchmarks/layout_rows.py` has their settings):
{", ".join(result["variants"])}.
`flips`: in how many of the row's variants some token went to another code or expert.
Limit {LIMIT:.0e}.
Made by `python benchmarks/layout_matrix.py` in {result["wall_seconds"] / 60:.0f} minutes on
{machine["cores"]} cores ({machine["processor"]}, Python {machine["python"]},
torch {versions["torch"]}, megatron-core {versions["megatron-core"]}),
commit {commit_in_words(result)}.

""" + "\n".join([*table_lines(cells), ""])


def chosen(text: str | None, legal: dict[str, Any], option: str) -> list[str]:
    """Return the comma-separated names, or all."""
    names = text.split(",") if text else list(legal)
    if unknown := [name for name in names if name not in legal]:
        raise SystemExit(f"{option} {', '.join(unknown)}: choose from {', '.join(legal)}")
    return names


def main() -> None:
    """Run the matrix, print and write the table, and end with 1 when a cell is not within LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=ROOT / "data" / "stdlib")
    parser.add_argument("--json", type=Path, help="file to write, with Markdown beside it")
    parser.add_argument("--layouts", help=f"comma-separated: {','.join(LAYOUTS)}")
    parser.add_argument("--variants", help=f"comma-separated: {','.join(VARIANTS)}")
    parser.add_argument("--iterations", type=int, default=RECIPE_ITERATIONS)
    arguments = parser.parse_args()
    names = chosen(arguments.layouts, LAYOUTS, "--layouts")
    variants = {
        name: list(OPTION_VARIANTS)
        if LAYOUTS[name].is_option and not arguments.variants
        else chosen(arguments.variants, VARIANTS, "--variants")
        for name in names
    }
    ran = [name for name in VARIANTS if any(name in row for row in variants.values())]
    result = {**origin(), "num_iterations": arguments.iterations, "variants": ran}
    cells: dict[str, list[Cell]] = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vqmoe_layouts_") as folder:
        matrix = Matrix(arguments.corpus, arguments.iterations, Path(folder))
        try:
            matrix.add_references(variants)
            for name in sorted(names, key=lambda name: LAYOUTS[name].num_ranks):
                cells[name] = []
                for cell in matrix.cells(name, variants[name]):
                    cells[name].append(cell)
                    figures = cell.complaint or (
                        f"{name} {cell.variant}: loss {cell.loss:.1e}, grad_norm "
                        f"{cell.grad_norm:.1e}, val loss {cell.val_loss:.1e}"
                    )
                    print(f"{figures}{cell.flip_text}; {cell.seconds:.1f} s", flush=True)
                result["wall_seconds"] = time.perf_counter() - started
                if arguments.json:
                    write(arguments.json, result, cells, matrix.reference_seconds)
        finally:
            matrix.worlds.close()

    print("", *table_lines(cells), sep="\n")
    complaints = [c.complaint for row in cells.values() for c in row if c.complaint is not None]
    for complaint in complaints:
        print(f"not within {LIMIT:.0e}: {complaint}")
    sys.exit(1 if complaints else 0)


def write(
    path: Path, result: dict[str, Any], cells: dict[str, list[Cell]], reference_seconds: list[float]
) -> None:
    """Write every cell as JSON, and the table as Markdown beside it."""
    layouts = {name: asdict(LAYOUTS[name]) for name in cells}
    rows = [asdict(cell) for row in cells.values() for cell in row]
    whole = {**result, "reference_seconds": reference_seconds, "layouts": layouts, "rows": rows}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(result, cells))


if __name__ == "__main__":
    main()
