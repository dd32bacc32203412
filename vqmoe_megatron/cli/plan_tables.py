"""How a plan is shown: tables for people, one idea each, long ones shortened to their ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vqmoe_megatron.plan.grid import code_owners, rank_grid, rank_groups
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory import EXCLUDED
from vqmoe_megatron.plan.run_plan import NOT_MEASURED, RunPlan
from vqmoe_megatron.plan.search import SearchResult
from vqmoe_megatron.simulate.simulated_step import SimulatedStep

MOST_ROWS = 16  # of ranks, owners and stages; more are shown as the first and the last ones
SIZES = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("VPP", "virtual_pipeline_model_parallel_size"),
    ("CP", "context_parallel_size"),
    ("DP", "data_parallel_size"),
    ("EP", "expert_model_parallel_size"),
    ("ETP", "expert_tensor_parallel_size"),
    ("EDP", "expert_data_parallel_size"),
)


def show_errors(plan: RunPlan, console: Console) -> None:
    """Print every broken rule as its equation."""
    ranks = f"{plan.world_size} rank{'s' if plan.world_size != 1 else ''}"
    table = _table(f"error: the recipe cannot run on {ranks}", "rule that does not hold")
    for error in plan.errors:
        table.add_row(error)
    console.print(table)


def show_plan(plan: RunPlan, assumptions: Sequence[str], console: Console) -> None:
    """Print everything a layout costs."""
    tables = (
        _configuration(plan),
        _rank_grid(plan.layout),
        _groups(plan),
        _owners(plan),
        _parameters(plan),
        _memory(plan),
        _flops(plan),
        _wire(plan),
        _step_time(plan),
    )
    for table in tables:
        console.print(table)
    console.print("Not in the memory figures: " + "; ".join(EXCLUDED) + ".")
    console.print(_memory_verdict(plan))
    for sentence in (*assumptions, *plan.figures.wire.assumptions, NOT_MEASURED):
        console.print(f"assumed: {sentence}")


def show_search(result: SearchResult, world_size: int, hardware: str, console: Console) -> None:
    """Print the best layouts, the recipe's own among or below them, and why the others fell out."""
    names = [name for name, _ in SIZES if name != "CP"]
    table = _table(
        f"best layouts of {world_size} ranks on {hardware}, by predicted step time",
        *("rank", *names, "micro batch", "distributed optimizer", "microbatches", "peak memory"),
        *("exposed wire", "bubble", "step", "tokens/s"),
    )
    own, own_rank = result.own, result.own_rank
    rows = list(enumerate(result.best, start=1))
    if own_rank is None or own_rank > len(rows):
        rows.append((own_rank, own))
    for place, plan in rows:
        sizes, train = dict(_sizes_as_planned(plan)), plan.config.train
        table.add_row(
            f"{place or '-'}{' (recipe)' if place == own_rank else ''}",
            *(sizes[name] for name in names),
            str(train.micro_batch_size),
            "yes" if plan.config.optimizer.use_distributed_optimizer else "no",
            *(["-"] * 6 if plan.errors else _search_figures(plan)),
        )
    console.print(table)
    verdict = [_memory_verdict(own)] if own_rank is None and not own.errors else []
    for reason in (*own.errors, *verdict):
        console.print(f"recipe: {reason}")
    dropped = _table("why the others fell out", "candidates", "reason")
    for reason, count in result.dropped.items():
        dropped.add_row(f"{count:,}", reason)
    console.print(dropped)
    console.print(f"{result.num_fitting:,} of {result.num_tried:,} candidates can run.")
    if not result.num_fitting and result.smallest_peak_bytes is not None:
        console.print(f"The smallest needs {bytes_text(result.smallest_peak_bytes)} per rank.")
    console.print(f"assumed: {NOT_MEASURED}")


def _sizes_as_planned(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Sizes of all axes; of a layout that cannot run those that the recipe names."""
    if not plan.errors:
        yield from layout_sizes(plan.layout)
        return
    for name, attribute in SIZES:
        yield name, str(getattr(plan.config.parallel, attribute, None) or "-")


def _search_figures(plan: RunPlan) -> Iterator[str]:
    time, train = plan.step_time, plan.config.train
    yield str(plan.layout.num_microbatches(train.global_batch_size, train.micro_batch_size))
    yield bytes_text(plan.memory_bytes)
    for seconds in (time.exposed_seconds, time.bubble_seconds, time.total_seconds):
        yield seconds_text(seconds)
    yield f"{time.tokens_per_second:,.0f}"


def show_simulation(simulated: SimulatedStep, console: Console) -> None:
    """Print what simulated ranks would send beside what the plan says."""
    for rank in simulated.ranks:
        title = f"rank {rank.rank} of {simulated.world_size}, stage {rank.pipeline_rank}, simulated"
        columns = ("collective", "axis", "calls", "planned", "simulated", "agree")
        table = _table(title, *columns)
        for entry in simulated.comparison(rank):
            table.add_row(
                entry.collective,
                entry.axis,
                f"{entry.counted[0]:,}",
                f"{float(entry.planned[1]):,.10g}",
                f"{float(entry.counted[1]):,.10g}",
                "yes" if entry.is_equal else f"NO: planned {entry.planned[0]:,} calls",
            )
        console.print(table)
    console.print(
        f"simulated {len(simulated.ranks)} rank(s) in {simulated.seconds:.1f} s "
        f"({simulated.cpu_seconds:.1f} s of processor) and "
        f"{bytes_text(simulated.peak_memory_bytes)}"
    )
    for note in simulated.notes:
        console.print(f"note: {note}")
    if not simulated.matches:
        console.print("PLAN AND SIMULATION DIFFER")


def layout_sizes(layout: ParallelLayout) -> Iterator[tuple[str, str]]:
    """Short name and size of every axis; VPP ``-`` without interleaving."""
    for name, attribute in SIZES:
        yield name, str(getattr(layout, attribute) or "-")


def bytes_text(number: float) -> str:
    """``1.2 GiB``; whole bytes below one KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1024
    return f"{number:.2f} TiB"


def seconds_text(seconds: float) -> str:
    """``12.3 ms``, ``4.56 s``."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _ends(rows: list[list[str]]) -> list[list[str]]:
    """All rows, or the first and last ones with a row of dots between them."""
    if len(rows) <= MOST_ROWS:
        return rows
    half = MOST_ROWS // 2
    return [*rows[:half], ["..."] * len(rows[0]), *rows[-half:]]


def _configuration(plan: RunPlan) -> Table:
    model, vq, train = plan.config.model, plan.config.vq, plan.config.train
    table = _table("configuration", "setting", "value")
    layout = plan.layout
    num_microbatches = layout.num_microbatches(train.global_batch_size, train.micro_batch_size)
    for name, value in (
        (
            "model",
            f"{model.num_layers} layers, hidden {model.hidden_size}, heads "
            f"{model.num_attention_heads}, sequence {model.seq_length}, vocabulary "
            f"{model.vocab_size}, {'bf16' if model.bf16 else 'fp32'}",
        ),
        (
            "experts",
            f"{model.num_moe_experts} of width {model.moe_ffn_hidden_size}, top-"
            f"{model.moe_router_topk}, every {model.moe_layer_freq} layer(s)",
        ),
        ("codes", f"{vq.num_codes} x {vq.num_code_slices} ({vq.quantizer}), path {vq.path}"),
        ("execution", vq.execution_in_words),
        (
            "batch",
            f"{train.global_batch_size} sequences = {plan.tokens_per_step:,} tokens, micro batch "
            f"{train.micro_batch_size}, {num_microbatches} microbatch(es)",
        ),
        ("layout", ", ".join(f"{name} {size}" for name, size in layout_sizes(layout))),
        ("hardware", f"{plan.hardware.name} (assumed, not measured)"),
    ):
        table.add_row(name, value)
    return table


def _rank_grid(layout: ParallelLayout) -> Table:
    columns = ("rank", "tp", "dp", "pp", "expert tp", "ep", "expert dp")
    table = _table(f"rank grid of {layout.world_size} ranks", *columns)
    rows = [
        [p.rank, p.tensor, p.data, p.pipeline, p.expert_tensor, p.expert, p.expert_data]
        for p in rank_grid(layout)
    ]
    for row in _ends([list(map(str, row)) for row in rows]):
        table.add_row(*row)
    return table


def _groups(plan: RunPlan) -> Table:
    columns = ("axis", "groups", "ranks", "first group", "nodes", "link", "what for")
    table = _table(f"groups, {plan.hardware.devices_per_node} ranks per node", *columns)
    for group in rank_groups(plan.layout, plan.hardware):
        table.add_row(
            group.axis,
            str(group.num_groups),
            str(group.num_ranks),
            group.first_group,
            str(group.nodes),
            group.link,
            group.purpose,
        )
    return table


def _owners(plan: RunPlan) -> Table:
    table = _table("experts and codes", "ep rank", "experts", "code rows", "which")
    rows = [
        [
            str(owner.expert_parallel_rank),
            f"{owner.first_expert}..{owner.last_expert}",
            str(owner.num_code_rows),
            owner.codes,
        ]
        for owner in code_owners(plan.config, plan.layout)
    ]
    for row in _ends(rows):
        table.add_row(*row)
    return table


def _parameters(plan: RunPlan) -> Table:
    counted = plan.parameters
    stages = _shown_stages(len(counted.per_rank))
    table = _table("parameters", "part", "total", "used by one token", *_stage_titles(stages))
    copies = (part for parts in counted.per_rank_by_part for part in parts)  # a tied table's, too
    for part in dict.fromkeys([*counted.total_by_part, *copies]):
        of_model = [found.get(part, 0) for found in (counted.total_by_part, counted.active_by_part)]
        of_ranks = [counted.per_rank_by_part[stage].get(part, 0) for stage in stages]
        table.add_row(part, *(f"{count:,}" for count in (*of_model, *of_ranks)))
    of_ranks = [f"{counted.per_rank[stage]:,}" for stage in stages]
    table.add_row("all", f"{counted.total:,}", f"{counted.active:,}", *of_ranks)
    return table


def _memory(plan: RunPlan) -> Table:
    stages = _shown_stages(len(plan.figures.memory))
    table = _table("memory of a rank", "part", *_stage_titles(stages), "exact")
    by_part = [plan.figures.memory[stage].by_part() for stage in stages]
    exact_parts = ("weights", "gradients", "optimizer", "codebook_statistics")
    for part in by_part[0]:
        is_exact = "yes" if part in exact_parts else "estimate"
        table.add_row(part, *(bytes_text(parts[part]) for parts in by_part), is_exact)
    return table


def _memory_verdict(plan: RunPlan) -> str:
    peak, device = bytes_text(plan.memory_bytes), bytes_text(plan.hardware.memory_bytes)
    if plan.fits:
        return f"The fullest rank needs {peak} of {device}."
    return f"DOES NOT FIT: the fullest rank needs {peak}, the device has {device}."


def _flops(plan: RunPlan) -> Table:
    flops = plan.figures.flops
    table = _table("operations of a step, all ranks", "part", "FLOP")
    for part, count in flops.by_part.items():
        table.add_row(f"{part} (forward + backward)", f"{count:.4g}")
    table.add_row("recompute", f"{flops.all_ranks.recompute:.4g}")
    table.add_row("all", f"{flops.all_ranks.total:.4g}")
    table.add_row("per token, without recompute", f"{flops.per_token:.4g}")
    return table


def _wire(plan: RunPlan) -> Table:
    time = plan.step_time
    columns = ("part", "axis", "link", "sent", "time", "of it hidden")
    title = f"sent by a rank of stage {time.pipeline_rank} in a step"
    table = _table(title, *columns)
    for entry in time.communication:
        table.add_row(
            entry.part,
            entry.axis,
            entry.link,
            bytes_text(entry.sent_bytes),
            seconds_text(entry.seconds),
            seconds_text(entry.overlapped_seconds),
        )
    total = bytes_text(plan.wire_bytes_per_step)
    table.add_row("all of the busiest rank", "", "", total, "", "")
    return table


def _step_time(plan: RunPlan) -> Table:
    time = plan.step_time
    table = _table(f"predicted step on {time.hardware} (not measured)", "part", "time", "what")
    reads = f"operations {seconds_text(time.flop_seconds)}, weight reads "
    reads += seconds_text(time.weight_read_seconds)
    for part, seconds, what in (
        ("compute", time.compute_seconds, f"the larger of {reads}"),
        ("communication", time.exposed_seconds, "exposed"),
        ("hidden communication", time.overlapped_seconds, "not in the sum"),
        ("pipeline bubble", time.bubble_seconds, "(PP - 1) / VPP microbatches"),
        ("optimizer", time.optimizer_seconds, "state read and written once"),
        ("step", time.total_seconds, f"{time.tokens_per_second:,.0f} tokens/s"),
    ):
        table.add_row(part, seconds_text(seconds), what)
    table.add_row("model FLOP/s utilisation", f"{time.model_flops_utilisation:.1%}", "of the peak")
    return table


def _shown_stages(num_stages: int) -> list[int]:
    """All of up to four, else the first two and the last two."""
    if num_stages <= 4:
        return list(range(num_stages))
    return [0, 1, num_stages - 2, num_stages - 1]


def _stage_titles(stages: list[int]) -> list[str]:
    return ["rank"] if stages == [0] else [f"rank of stage {stage}" for stage in stages]
