"""``vqmoe bench``: the commands, their options, and how each result is shown.

Exits: 0 done, 1 when arms disagree or counted bytes are not the predicted ones, 2 for refused
input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vqmoe_megatron.bench.cases import (
    PASSES,
    ROUTINGS,
    LayerCase,
    check_repeats,
    layer_cases,
    parse_choices,
    parse_codes,
    parse_numbers,
)
from vqmoe_megatron.bench.report import Layout, Outputs, Row, show, write
from vqmoe_megatron.runtime.table_console import table_console

FAILED = 1

bench_app = typer.Typer(no_args_is_help=True, help="Benchmark the layer and its parts.")

Experts = Annotated[str, typer.Option(help="comma-separated values of N")]
Codes = Annotated[str, typer.Option(help="comma-separated values of K; N: as many as experts")]
Tokens = Annotated[int, typer.Option(help="T, per rank")]
Hidden = Annotated[int, typer.Option(help="H")]
Ffn = Annotated[int, typer.Option(help="F, expert hidden size")]
Routing = Annotated[str, typer.Option(help="comma-separated: balanced, zipf, one-hot")]
Norm = Annotated[str, typer.Option(help="norms of the discrete path: none, separate or shared")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16")]
Arms = Annotated[str, typer.Option(help="comma-separated letters; default: all")]
Repeats = Annotated[int, typer.Option(help="timed rounds, each arm once in each")]
Warmup = Annotated[int, typer.Option(help="untimed rounds before them")]
Json = Annotated[Path | None, typer.Option("--json", help="file for the rows and the machine")]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="file for a table with ratios")]
Plot = Annotated[Path | None, typer.Option("--plot", help="PNG file for a bar plot of ratios")]

SIZES = ("num_experts", "num_codes", "num_tokens", "routing", "pass")
DECILES = ("p10_ms", "p90_ms")


@bench_app.callback()
def _bench() -> None:
    """Benchmark the layer and its parts."""


@bench_app.command()
def layer(
    num_experts: Experts = "16,64,256",
    num_codes: Codes = "64,N",
    num_tokens: Tokens = 4096,
    hidden_size: Hidden = 256,
    ffn_hidden_size: Ffn = 1024,
    routing: Routing = "balanced",
    passes: Annotated[str, typer.Option(help="comma-separated: forward, forward_backward")] = (
        "forward,forward_backward"
    ),
    norm: Norm = "none",
    dtype: Dtype = "float32",
    arms: Arms = "",
    repeats: Repeats = 20,
    warmup: Warmup = 3,
    json: Json = None,
    markdown: Markdown = None,
    plot: Plot = None,
) -> None:
    """Time whole layers against Megatron's, one process, arms in turns, equality gate first.

    Example: vqmoe bench layer --num-experts 16 --num-codes 64 --routing zipf --json layer.json
    """
    cases = _cases(num_experts, num_codes, routing, num_tokens=num_tokens, norm=norm, dtype=dtype,
                   hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size)  # fmt: skip
    chosen_passes = parse_choices(passes, "--passes", PASSES)
    check_repeats(repeats, warmup)
    letters = _letters(arms)

    def measure(case: LayerCase) -> list[Row]:
        from vqmoe_megatron.bench.layer_bench import measure_layers

        return measure_layers(case, chosen_passes, letters, repeats, warmup)

    shown = Layout("vqmoe bench layer", "median_ms", "A", SIZES, DECILES)
    _measure_in_world(cases, measure, shown, Outputs(json, markdown, plot))


@bench_app.command()
def dispatch(
    num_experts: Experts = "256",
    num_codes: Codes = "N",
    num_tokens: Tokens = 4096,
    hidden_size: Hidden = 256,
    routing: Routing = "balanced",
    dtype: Dtype = "float32",
    repeats: Repeats = 50,
    warmup: Warmup = 5,
    json: Json = None,
    markdown: Markdown = None,
    plot: Plot = None,
) -> None:
    """Time the way of tokens to their experts: search and plan against router and map.

    Example: vqmoe bench dispatch --num-experts 64,256 --json dispatch.json
    """
    cases = _cases(num_experts, num_codes, routing, num_tokens=num_tokens, dtype=dtype,
                   hidden_size=hidden_size, ffn_hidden_size=hidden_size)  # fmt: skip
    check_repeats(repeats, warmup)

    def measure(case: LayerCase) -> list[Row]:
        from vqmoe_megatron.bench.dispatch_bench import measure_dispatch

        return measure_dispatch(case, repeats, warmup)

    shown = Layout("vqmoe bench dispatch", "median_ms", "A", SIZES, DECILES)
    _measure_in_world(cases, measure, shown, Outputs(json, markdown, plot))


@bench_app.command()
def search(
    num_codes: Annotated[str, typer.Option(help="comma-separated values of K")] = (
        "64,256,1024,4096"
    ),
    widths: Annotated[str, typer.Option(help="comma-separated values of D")] = "32,256",
    num_tokens: Tokens = 4096,
    repeats: Repeats = 20,
    warmup: Warmup = 3,
    json: Json = None,
    markdown: Markdown = None,
    plot: Plot = None,
) -> None:
    """Time the nearest-code search against cdist with argmin, and against its bare product.

    Example: vqmoe bench search --num-codes 512,4096 --widths 256 --json search.json
    """
    outputs = Outputs(json, markdown, plot)
    all_codes = parse_numbers(num_codes, "--num-codes")
    all_widths = parse_numbers(widths, "--widths")
    parse_numbers(str(num_tokens), "--num-tokens")
    check_repeats(repeats, warmup)

    def measure() -> list[Row]:
        from vqmoe_megatron.bench.search_bench import measure_search

        return [
            row
            for width in all_widths
            for codes in all_codes
            for row in measure_search(num_tokens, width, codes, repeats, warmup)
        ]

    shown = Layout("vqmoe bench search", "median_ms", "gemm", ("num_tokens", "width", "num_codes"),
                   (*DECILES, "gflops_per_second"))  # fmt: skip
    _finish(measure, shown, outputs)


@bench_app.command()
def memory(
    num_experts: Experts = "16",
    num_codes: Codes = "64",
    num_tokens: Tokens = 4096,
    hidden_size: Hidden = 256,
    ffn_hidden_size: Ffn = 1024,
    routing: Routing = "balanced",
    norm: Norm = "none",
    dtype: Dtype = "float32",
    arms: Arms = "",
    json: Json = None,
    markdown: Markdown = None,
    plot: Plot = None,
) -> None:
    """Count the bytes that each arm's forward pass saves for its backward pass.

    Example: vqmoe bench memory --num-experts 16 --num-codes 64 --markdown memory.md
    """
    cases = _cases(num_experts, num_codes, routing, num_tokens=num_tokens, norm=norm, dtype=dtype,
                   hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size)  # fmt: skip
    letters = _letters(arms)

    def measure(case: LayerCase) -> list[Row]:
        from vqmoe_megatron.bench.memory_bench import measure_memory

        return measure_memory(case, letters)

    shown = Layout(
        "vqmoe bench memory", "saved_bytes", "A", SIZES, ("predicted_saved_bytes", "peak_bytes")
    )
    _measure_in_world(cases, measure, shown, Outputs(json, markdown, plot))


@bench_app.command()
def wire(
    layouts: Annotated[
        str, typer.Option(help="comma-separated: ep1, ep2, etp2, ep4, tp2ep2")
    ] = "ep1,ep2,etp2,ep4,tp2ep2",
    num_experts: Annotated[int, typer.Option(help="N")] = 16,
    num_codes: Annotated[int, typer.Option(help="K")] = 64,
    num_tokens: Tokens = 512,
    hidden_size: Hidden = 64,
    ffn_hidden_size: Ffn = 128,
    routing: Annotated[str, typer.Option(help="balanced, zipf or one-hot")] = "zipf",
    norm: Norm = "none",
    dtype: Dtype = "float32",
    arms: Arms = "",
    json: Json = None,
    markdown: Markdown = None,
    plot: Plot = None,
) -> None:
    """Count the bytes that a layer sends on local gloo ranks, against the cost model's formulas.

    Example: vqmoe bench wire --layouts ep4 --arms A,C,E,F --json wire.json
    """
    outputs = Outputs(json, markdown, plot)
    case = LayerCase(num_experts, num_codes, num_tokens, hidden_size, ffn_hidden_size, routing,
                     norm, dtype)  # fmt: skip

    def measure() -> list[Row]:
        from vqmoe_megatron.bench.wire_bench import measure_wire

        return measure_wire(case, layouts.split(","), _letters(arms))

    shown = Layout("vqmoe bench wire", "wire_bytes", "A", ("layout", *SIZES),
                   ("predicted_wire_bytes", "matches"))  # fmt: skip
    rows = _finish(measure, shown, outputs)
    wrong = [f"{r['layout']} {r['arm']} {r['pass']}" for r in rows if r["matches"] is False]
    if wrong:
        print(f"counted bytes are not the predicted ones: {', '.join(wrong)}", file=sys.stderr)
        raise typer.Exit(FAILED)


@bench_app.command(hidden=True)
def wire_rank(folder: Annotated[Path, typer.Argument(help="of the job file")]) -> None:
    """Be one rank of ``vqmoe bench wire``; started by it."""
    from vqmoe_megatron.bench.wire_rank import run_wire_rank
    from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages

    quiet_known_messages()
    run_wire_rank(folder)


def _letters(text: str) -> list[str]:
    return text.split(",") if text else []


def _cases(num_experts: str, num_codes: str, routing: str, **common: object) -> list[LayerCase]:
    cases, left_out = layer_cases(
        parse_numbers(num_experts, "--num-experts"),
        parse_codes(num_codes),
        parse_choices(routing, "--routing", ROUTINGS),
        **common,
    )
    for reason in left_out:
        print(f"left out: {reason}")
    return cases


def _measure_in_world(
    cases: list[LayerCase],
    measure: Callable[[LayerCase], list[Row]],
    shown: Layout,
    outputs: Outputs,
) -> None:
    def measure_all() -> list[Row]:
        from vqmoe_megatron.bench.bench_world import one_rank_world
        from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages

        quiet_known_messages()
        with one_rank_world() as device:
            from vqmoe_megatron.moe.spec import spec_backend

            print(f"on {device}; Megatron's arms: {' because '.join(spec_backend())}")
            return [row for case in cases for row in measure(case)]

    _finish(measure_all, shown, outputs)


def _finish(measure: Callable[[], list[Row]], shown: Layout, outputs: Outputs) -> list[Row]:
    """Measure, show and write; a failed gate or rank is one message and exit code 1."""
    from vqmoe_megatron.bench.failures import BenchFailed
    from vqmoe_megatron.bench.origin import origin

    found_origin = origin()  # before anything loads the machine
    try:
        rows = measure()
    except BenchFailed as failure:
        print(f"no result: {failure}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    console = table_console()
    show(rows, shown, console)
    write(rows, shown, found_origin, outputs)
    return rows
