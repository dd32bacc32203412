"""How a plan is shown: tables for people, one idea each, long ones shortened to their ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vqmoe_megatron.config import ParallelConfig
from vqmoe_megatron.plan.grid import code_owners, rank_grid, rank_groups
from vqmoe_megatron.plan.kernels import Row
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory import EXCLUDED
from vqmoe_megatron.plan.memory_report import code_memory_json
from vqmoe_megatron.plan.run_plan import NOT_MEASURED, RunPlan
from vqmoe_megatron.plan.search import SearchResult
from vqmoe_megatron.simulate.simulated_step import SimulatedStep

MOST_ROWS = 16  # of ranks, owners and stages; more are shown as the first and the last ones
BOUNDS = {
    "bf16_tensor_core": "bf16 tensor core",
    "fp32_fma": "fp32 FMA",
    "bandwidth": "bandwidth",
    "launches": "launches",
}
SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "DP": "data_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "EDP": "expert_data_parallel_size",
}


def show_errors(plan: RunPlan, console: Console) -> None:
    """Print every broken rule as its equation, or what no plan counts."""
    title = f"error: {plan.refusal}"
    console.print(_table(title, ["rule that does not hold"], ([error] for error in plan.errors)))


def show_plan(plan: RunPlan, assumptions: Sequence[str], console: Console) -> None:
    """Print everything a layout costs."""
    console.print(_configuration(plan))
    console.print(_rank_grid(plan.layout))
    for table in (_groups, _owners, _parameters, _memory, _flops, _wire, _step_time):
        console.print(table(plan))
    if plan.config.code_memory.is_on:
        console.print(_code_memory(plan))
    console.print("Not in the memory figures: " + "; ".join(EXCLUDED) + ".")
    console.print(_memory_verdict(plan))
    for sentence in (*assumptions, *plan.figures.wire.assumptions, NOT_MEASURED):
        console.print(f"assumed: {sentence}")


def show_search(result: SearchResult, world_size: int, hardware: str, console: Console) -> None:
    """Print the best layouts, the recipe's own among or below them, and why the others fell out."""
    names = [name for name in SIZES if name != "CP"]
    own, own_rank = result.own, result.own_rank
    shown = list(enumerate(result.best, start=1))
    if own_rank is None or own_rank > len(shown):
        shown.append((own_rank, own))
    columns = ("rank", *names, "micro batch", "distributed optimizer", "microbatches")
    columns += ("peak memory", "exposed wire", "bubble", "step", "tokens/s")
    title = f"best layouts of {world_size} ranks on {hardware}, by predicted step time"
    rows = (
        [
            f"{place or '-'}{' (recipe)' if place == own_rank else ''}",
            # of a layout that cannot run the sizes that the recipe names
            *(_size(plan.config.parallel if plan.errors else plan.layout, name) for name in names),
            plan.config.train.micro_batch_size,
            "yes" if plan.config.optimizer.use_distributed_optimizer else "no",
            *(["-"] * 6 if plan.errors else _search_figures(plan)),
        ]
        for place, plan in shown
    )
    console.print(_table(title, columns, rows))
    verdict = [_memory_verdict(own)] if own_rank is None and not own.errors else []
    for reason in (*own.errors, *verdict):
        console.print(f"recipe: {reason}")
    dropped = ([f"{count:,}", reason] for reason, count in result.dropped.items())
    console.print(_table("why the others fell out", ("candidates", "reason"), dropped))
    console.print(f"{result.num_fitting:,} of {result.num_tried:,} candidates can run.")
    if not result.num_fitting and result.smallest_peak_bytes is not None:
        console.print(f"The smallest needs {bytes_text(result.smallest_peak_bytes)} per rank.")
    console.print(f"assumed: {NOT_MEASURED}")


def _search_figures(plan: RunPlan) -> Iterator[str]:
    time, train = plan.step_time, plan.config.train
    yield str(plan.layout.num_microbatches(train))
    yield bytes_text(plan.memory_bytes)
    for seconds in (time.exposed_seconds, time.bubble_seconds, time.total_seconds):
        yield seconds_text(seconds)
    yield f"{time.tokens_per_second:,.0f}"


def show_simulation(simulated: SimulatedStep, console: Console) -> None:
    """Print what simulated ranks would send beside what the plan says."""
    for rank in simulated.ranks:
        title = f"rank {rank.rank} of {simulated.world_size}, stage {rank.pipeline_rank}, simulated"
        columns = ("collective", "axis", "calls", "planned", "simulated", "agree")
        rows = (
            [
                *(entry.collective, entry.axis, f"{entry.counted[0]:,}"),
                *(f"{float(sent):,.10g}" for _, sent in (entry.planned, entry.counted)),
                "yes" if entry.is_equal else f"NO: planned {entry.planned[0]:,} calls",
            ]
            for entry in simulated.comparison(rank)
        )
        console.print(_table(title, columns, rows))
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
    return ((name, _size(layout, name)) for name in SIZES)


def _size(sizes: ParallelLayout | ParallelConfig, name: str) -> str:
    return str(getattr(sizes, SIZES[name], None) or "-")


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


def _table(title: str, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _ends(rows: list[list[object]]) -> list[list[object]]:
    """All rows, or the first and last ones with a row of dots between them."""
    if len(rows) <= MOST_ROWS:
        return rows
    half = MOST_ROWS // 2
    return [*rows[:half], ["..."] * len(rows[0]), *rows[-half:]]


def _configuration(plan: RunPlan) -> Table:
    model, vq, train = plan.config.model, plan.config.vq, plan.config.train
    layout, vision = plan.layout, plan.config.vision
    num_microbatches = layout.num_microbatches(train)
    reads = vision.in_words if vision.is_on else f"vocabulary {model.vocab_size}"
    rows = (
        (
            "model",
            f"{model.num_layers} layers, hidden {model.hidden_size}, heads "
            f"{model.num_attention_heads}, sequence {model.seq_length}, {reads}, "
            f"{'bf16' if model.bf16 else 'fp32'}",
        ),
        ("experts", plan.config.experts_in_words),
        ("codes", f"{vq.num_codes} x {vq.num_code_slices} ({vq.quantizer}), path {vq.path}"),
        ("execution", vq.execution_in_words),
        ("code memory", plan.config.code_memory.in_words),
        (
            "batch",
            f"{train.global_batch_size} sequences = {plan.tokens_per_step:,} tokens, micro batch "
            f"{train.micro_batch_size}, {num_microbatches} microbatch(es)",
        ),
        ("layout", ", ".join(f"{name} {size}" for name, size in layout_sizes(layout))),
        ("hardware", f"{plan.hardware.name} (assumed, not measured)"),
    )
    return _table("configuration", ("setting", "value"), rows)


def _code_memory(plan: RunPlan) -> Table:
    """Rows of one layer on a rank, and how they reach the tokens that read them."""
    memory = code_memory_json(plan.config, plan.layout)
    rows = [
        ("rows of a rank", f"{memory['rows_per_rank']:,} of {memory['rows_per_layer']:,}"),
        ("their bytes", bytes_text(memory["row_bytes_per_rank"])),
        ("reads of a rank's microbatch", f"{memory['num_reads']:,}"),
        ("distinct rows among them, at most", f"{memory['expected_distinct_rows']:,.0f}"),
        ("exchange", memory["form"]),
    ]
    sent = {
        "sent per microbatch, for all layers": memory["plan_bytes_by_axis"],
        "sent per layer and microbatch": memory["layer_bytes_by_axis"],
        "sent once per step, until codes are frozen": memory["codes_bytes_by_axis"],
    }
    for what, by_axis in sent.items():
        said = ", ".join(f"{axis} {bytes_text(sent)}" for axis, sent in by_axis.items())
        rows.append((what, said or "nothing"))
    return _table("code memory of a layer", ("what", "value"), rows)


def _rank_grid(layout: ParallelLayout) -> Table:
    columns = ("rank", "tp", "dp", "pp", "expert tp", "ep", "expert dp")
    rows = [
        [p.rank, p.tensor, p.data, p.pipeline, p.expert_tensor, p.expert, p.expert_data]
        for p in rank_grid(layout)
    ]
    return _table(f"rank grid of {layout.world_size} ranks", columns, _ends(rows))


def _groups(plan: RunPlan) -> Table:
    columns = ("axis", "groups", "ranks", "first group", "nodes", "link", "what for")
    rows = (
        [g.axis, g.num_groups, g.num_ranks, g.first_group, g.nodes, g.link, g.purpose]
        for g in rank_groups(plan.layout, plan.hardware)
    )
    return _table(f"groups, {plan.hardware.devices_per_node} ranks per node", columns, rows)


def _owners(plan: RunPlan) -> Table:
    rows = [
        [o.expert_parallel_rank, f"{o.first_expert}..{o.last_expert}", o.num_code_rows, o.codes]
        for o in code_owners(plan.config, plan.layout)
    ]
    columns = ("ep rank", "experts", "code rows", "which")
    return _table("experts and codes", columns, _ends(rows))


def _parameters(plan: RunPlan) -> Table:
    counted = plan.parameters
    stages = _shown_stages(len(counted.per_rank))
    by_part = [counted.total_by_part, counted.active_by_part]
    by_part += [counted.per_rank_by_part[stage] for stage in stages]
    copies = (part for parts in counted.per_rank_by_part for part in parts)  # a tied table's, too
    parts = dict.fromkeys([*counted.total_by_part, *copies])
    rows = [[part, *(f"{found.get(part, 0):,}" for found in by_part)] for part in parts]
    rows.append(["all", *(f"{sum(found.values()):,}" for found in by_part)])
    columns = ("part", "total", "used by one token", *_stage_titles(stages))
    return _table("parameters", columns, rows)


def _memory(plan: RunPlan) -> Table:
    stages = _shown_stages(len(plan.figures.memory))
    by_part = [plan.figures.memory[stage].by_part() for stage in stages]
    exact = ("weights", "gradients", "optimizer", "codebook_statistics", "segment_memory")
    rows = (
        [part, *(bytes_text(of[part]) for of in by_part), "yes" if part in exact else "estimate"]
        for part in by_part[0]
    )
    return _table("memory of a rank", ("part", *_stage_titles(stages), "exact"), rows)


def _memory_verdict(plan: RunPlan) -> str:
    peak, device = bytes_text(plan.memory_bytes), bytes_text(plan.hardware.memory_bytes)
    if plan.fits:
        return f"The fullest rank needs {peak} of {device}."
    return f"DOES NOT FIT: the fullest rank needs {peak}, the device has {device}."


def _flops(plan: RunPlan) -> Table:
    flops = plan.figures.flops
    counts = {f"{part} (forward + backward)": count for part, count in flops.by_part.items()} | {
        "recompute": flops.all_ranks.recompute,
        "all": flops.all_ranks.total,
        "per token, without recompute": flops.per_token,
    }
    rows = ([part, f"{count:.4g}"] for part, count in counts.items())
    return _table("operations of a step, all ranks", ("part", "FLOP"), rows)


def _wire(plan: RunPlan) -> Table:
    time = plan.step_time
    rows = [
        [
            *(e.part, e.axis, e.link, bytes_text(e.sent_bytes)),
            *map(seconds_text, (e.seconds, e.overlapped_seconds)),
        ]
        for e in time.communication
    ]
    total = bytes_text(plan.wire_bytes_per_step)
    rows.append(["all of the busiest rank", "", "", total, "", ""])
    columns = ("part", "axis", "link", "sent", "time", "of it hidden")
    return _table(f"sent by a rank of stage {time.pipeline_rank} in a step", columns, rows)


def _step_time(plan: RunPlan) -> Table:
    time = plan.step_time
    rows = [
        [row.part, seconds_text(row.seconds), _share(row.seconds, time.total_seconds), _bounds(row)]
        for row in time.rows
    ]
    others = {
        "communication": "exposed",
        "pipeline bubble": "(PP - 1) / VPP microbatches",
        "optimizer": "state read and written once",
    }
    for part, what in others.items():
        seconds = time.parts[part]
        rows.append([part, seconds_text(seconds), _share(seconds, time.total_seconds), what])
    speed = f"{time.tokens_per_second:,.0f} tokens/s"
    rows.append(["step", seconds_text(time.total_seconds), "100%", speed])
    rows.append(["hidden communication", seconds_text(time.overlapped_seconds), "", "not in it"])
    utilisation = f"{time.model_flops_utilisation:.1%}"
    rows.append(["model FLOP/s utilisation", utilisation, "", "of the peak"])
    title = f"predicted step on {time.hardware} (not measured)"
    return _table(title, ("part", "time", "share", "bound by"), rows)


def _share(seconds: float, total: float) -> str:
    return f"{seconds / total:.1%}"


def _bounds(row: Row) -> str:
    """``bf16 tensor core 81%, bandwidth 15%, launches 4%``, the largest first."""
    ordered = sorted(row.seconds_by_bound.items(), key=lambda found: -found[1])
    shown = [
        f"{BOUNDS[bound]} {seconds / row.seconds:.0%}"
        for bound, seconds in ordered
        if seconds >= row.seconds / 200
    ]
    return ", ".join(shown)


def _shown_stages(num_stages: int) -> list[int]:
    """All of up to four, else the first two and the last two."""
    if num_stages <= 4:
        return list(range(num_stages))
    return [0, 1, num_stages - 2, num_stages - 1]


def _stage_titles(stages: list[int]) -> list[str]:
    return ["rank"] if stages == [0] else [f"rank of stage {stage}" for stage in stages]
