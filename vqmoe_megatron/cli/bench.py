"""``vqmoe bench``: the commands, their options, and how each result is shown.

Exits: 0 done, 1 when arms disagree or counted bytes are not the predicted ones, 2 for refused
input. Progress goes to standard error.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from vqmoe_megatron.bench.cases import (
    PASSES,
    ROUTINGS,
    BenchFailed,
    LayerCase,
    check_repeats,
    layer_cases,
    parse_choices,
    parse_codes,
    parse_numbers,
)
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.report import Layout, Outputs, Row, show, write
from vqmoe_megatron.runtime.table_console import table_console
from vqmoe_megatron.runtime.versions import check_versions

FAILED = 1
Measure = Callable[[Progress], list[Row]]
Benchmark = Callable[[SimpleNamespace], Measure]

bench_app = typer.Typer(no_args_is_help=True, help="Benchmark the layer and its parts.")


def _option(kind: Any, text: str, *names: str) -> Any:
    return Annotated[kind, typer.Option(*names, help=text)]


# What an option is, wherever a command has it; its default there is the command's.
OPTIONS = {
    "layouts": _option(str, "comma-separated: ep1, ep2, etp2, ep4, tp2ep2"),
    "num_experts": _option(str, "comma-separated values of N"),
    "num_codes": _option(str, "comma-separated values of K; N: as many as experts"),
    "widths": _option(str, "comma-separated values of D"),
    "num_tokens": _option(int, "T, per rank"),
    "hidden_size": _option(int, "H"),
    "ffn_hidden_size": _option(int, "F, expert hidden size"),
    "routing": _option(str, "comma-separated: balanced, zipf, one-hot"),
    "passes": _option(str, "comma-separated: forward, forward_backward"),
    "norm": _option(str, "norms of the discrete path: none, separate or shared"),
    "dtype": _option(str, "float32 or bfloat16"),
    "arms": _option(str, "comma-separated letters; default: all"),
    "repeats": _option(int, "timed rounds, each arm once in each"),
    "warmup": _option(int, "untimed rounds before them"),
}
FILES = {
    "json": _option(Path | None, "file for the rows and the machine", "--json"),
    "markdown": _option(Path | None, "file for a table with ratios", "--markdown"),
    "plot": _option(Path | None, "PNG file for a bar plot of ratios", "--plot"),
}
SIZES = ("num_experts", "num_codes", "num_tokens", "routing", "pass")
DECILES = ("p10_ms", "p90_ms")


@bench_app.callback()
def _bench() -> None:
    """Benchmark the layer and its parts."""


def _command(
    layout: Layout, options: dict[str, Any] = OPTIONS, **defaults: object
) -> Callable[[Benchmark], Benchmark]:
    """Register a benchmark as a command: its options in the order of ``defaults``, then the files.

    What is registered checks its options and returns what measures; nothing is measured before the
    files were checked too.
    """

    kinds, defaults = options | FILES, defaults | dict.fromkeys(FILES)

    def register(benchmark: Benchmark) -> Benchmark:
        def command(**values: Any) -> None:
            files = {name: values.pop(name) for name in FILES}
            measure = benchmark(SimpleNamespace(**values))
            _finish(measure, layout, Outputs(**files))

        command.__name__, command.__doc__ = benchmark.__name__, benchmark.__doc__
        command.__signature__ = inspect.Signature(  # of which typer makes the command line
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kinds[name]
            )
            for name, value in defaults.items()
        )
        bench_app.command()(command)
        return benchmark

    return register


@_command(
    Layout("vqmoe bench layer", "median_ms", "A", SIZES, DECILES),
    num_experts="16,64,256", num_codes="64,N", num_tokens=4096, hidden_size=256,
    ffn_hidden_size=1024, routing="balanced", passes="forward,forward_backward", norm="none",
    dtype="float32", arms="", repeats=20, warmup=3,
)  # fmt: skip
def layer(options: SimpleNamespace) -> Measure:
    """Time whole layers against Megatron's, one process, arms in turns, equality gate first.

    Example: vqmoe bench layer --num-experts 16 --num-codes 64 --routing zipf --json layer.json
    """
    cases = _cases(options, norm=options.norm, ffn_hidden_size=options.ffn_hidden_size)
    passes = parse_choices(options.passes, "--passes", PASSES)
    check_repeats(options.repeats, options.warmup)

    def measure(case: LayerCase, progress: Progress) -> list[Row]:
        from vqmoe_megatron.bench.layer_bench import measure_layers

        letters = _letters(options)
        return measure_layers(case, passes, letters, options.repeats, options.warmup, progress)

    return _in_world(cases, measure)


@_command(
    Layout("vqmoe bench dispatch", "median_ms", "A", SIZES, DECILES),
    num_experts="256", num_codes="N", num_tokens=4096, hidden_size=256, routing="balanced",
    dtype="float32", repeats=50, warmup=5,
)  # fmt: skip
def dispatch(options: SimpleNamespace) -> Measure:
    """Time the way of tokens to their experts: search and plan against router and map.

    Example: vqmoe bench dispatch --num-experts 64,256 --json dispatch.json
    """
    cases = _cases(options, ffn_hidden_size=options.hidden_size)
    check_repeats(options.repeats, options.warmup)

    def measure(case: LayerCase, progress: Progress) -> list[Row]:
        from vqmoe_megatron.bench.dispatch_bench import measure_dispatch

        return measure_dispatch(case, options.repeats, options.warmup, progress)

    return _in_world(cases, measure)


@_command(
    Layout("vqmoe bench search", "median_ms", "gemm", ("num_tokens", "width", "num_codes"),
           (*DECILES, "gflops_per_second")),
    OPTIONS | {"num_codes": _option(str, "comma-separated values of K")},
    num_codes="64,256,1024,4096", widths="32,256", num_tokens=4096, repeats=20, warmup=3,
)  # fmt: skip
def search(options: SimpleNamespace) -> Measure:
    """Time the nearest-code search against cdist with argmin, and against its bare product.

    Example: vqmoe bench search --num-codes 512,4096 --widths 256 --json search.json
    """
    codes = parse_numbers(options.num_codes, "--num-codes")
    widths = parse_numbers(options.widths, "--widths")
    (num_tokens,) = parse_numbers(str(options.num_tokens), "--num-tokens")
    check_repeats(options.repeats, options.warmup)

    def measure(progress: Progress) -> list[Row]:
        from vqmoe_megatron.bench.search_bench import measure_search

        sizes = [(num_tokens, width, num_codes) for width in widths for num_codes in codes]
        timed = options.repeats, options.warmup, progress
        return [row for size in sizes for row in measure_search(*size, *timed)]

    return measure


@_command(
    Layout("vqmoe bench memory", "saved_bytes", "A", SIZES,
           ("predicted_saved_bytes", "peak_bytes")),
    num_experts="16", num_codes="64", num_tokens=4096, hidden_size=256, ffn_hidden_size=1024,
    routing="balanced", norm="none", dtype="float32", arms="",
)  # fmt: skip
def memory(options: SimpleNamespace) -> Measure:
    """Count the bytes that each arm's forward pass saves for its backward pass.

    Example: vqmoe bench memory --num-experts 16 --num-codes 64 --markdown memory.md
    """
    cases = _cases(options, norm=options.norm, ffn_hidden_size=options.ffn_hidden_size)

    def measure(case: LayerCase, progress: Progress) -> list[Row]:
        from vqmoe_megatron.bench.memory_bench import measure_memory

        return measure_memory(case, _letters(options), progress)

    return _in_world(cases, measure)


@_command(
    Layout("vqmoe bench wire", "wire_bytes", "A", ("layout", *SIZES),
           ("predicted_wire_bytes", "matches")),
    OPTIONS | {"num_experts": _option(int, "N"), "num_codes": _option(int, "K"),
               "routing": _option(str, "balanced, zipf or one-hot")},
    layouts="ep1,ep2,etp2,ep4,tp2ep2", num_experts=16, num_codes=64, num_tokens=512,
    hidden_size=64, ffn_hidden_size=128, routing="zipf", norm="none", dtype="float32", arms="",
)  # fmt: skip
def wire(options: SimpleNamespace) -> Measure:
    """Count the bytes that a layer sends on local gloo ranks, against the cost model's formulas.

    Example: vqmoe bench wire --layouts ep4 --arms A,C,E,F --json wire.json
    """
    sizes = {
        name: value for name, value in vars(options).items() if name not in ("layouts", "arms")
    }
    case = LayerCase(**sizes)

    def measure(progress: Progress) -> list[Row]:
        from vqmoe_megatron.bench.wire_bench import measure_wire

        return measure_wire(case, options.layouts.split(","), _letters(options), progress)

    return measure


@bench_app.command(hidden=True)
def wire_rank(folder: Annotated[Path, typer.Argument(help="of the job file")]) -> None:
    """Be one rank of ``vqmoe bench wire``; started by it."""
    from vqmoe_megatron.bench.wire_rank import run_wire_rank
    from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages

    quiet_known_messages()
    run_wire_rank(folder)


def _letters(options: SimpleNamespace) -> list[str]:
    return options.arms.split(",") if options.arms else []


def _cases(options: SimpleNamespace, **more: object) -> list[LayerCase]:
    cases, left_out = layer_cases(
        parse_numbers(options.num_experts, "--num-experts"),
        parse_codes(options.num_codes),
        parse_choices(options.routing, "--routing", ROUTINGS),
        num_tokens=options.num_tokens,
        hidden_size=options.hidden_size,
        dtype=options.dtype,
        **more,
    )
    for reason in left_out:
        print(f"left out: {reason}")
    return cases


def _in_world(
    cases: list[LayerCase], measure: Callable[[LayerCase, Progress], list[Row]]
) -> Measure:
    """Measure one case after the other in a world of one rank."""

    def measure_all(progress: Progress) -> list[Row]:
        from vqmoe_megatron.bench.bench_world import one_rank_world
        from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages

        quiet_known_messages()
        rows: list[Row] = []
        with one_rank_world() as device:
            from vqmoe_megatron.moe.spec import spec_backend

            progress.say(f"on {device}; Megatron's arms: {' because '.join(spec_backend())}")
            for number, case in enumerate(cases, 1):
                progress.stage = f"case {number} of {len(cases)}, "
                rows += measure(case, progress)
        return rows

    return measure_all


def _finish(measure: Measure, layout: Layout, outputs: Outputs) -> None:
    """Measure, show and write; a failed gate or rank is one message and exit code 1, and so are
    bytes that are not the predicted ones, after everything was written."""
    check_versions()
    from vqmoe_megatron.bench.origin import origin

    found_origin = origin()  # before anything loads the machine
    try:
        with Progress() as progress:
            rows = measure(progress)
    except BenchFailed as failure:
        print(f"no result: {failure}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    show(rows, layout, table_console())
    write(rows, layout, found_origin, outputs)
    wrong = [f"{r['layout']} {r['arm']} {r['pass']}" for r in rows if r.get("matches") is False]
    if wrong:
        print(f"counted bytes are not the predicted ones: {', '.join(wrong)}", file=sys.stderr)
        raise typer.Exit(FAILED)
