"""Bytes of a whole optimizer step: planned, simulated, and counted on real gloo ranks.

    vqmoe prepare stdlib --out data/stdlib
    python benchmarks/step_wire.py --corpus data/stdlib --json benchmarks/step_wire.json

For every layout of ``LAYOUTS``: the plan's bytes, those of a simulated rank of each stage, and
those that every real rank sent in a step with balanced routing; call by call, to the byte. Then
training goes on with the model's own routing, and the formulas, told how many rows travelled, must
give the bytes of every step. For ``LARGE`` worlds there is plan and simulation only, with the time
and memory that the simulation took. Writes the JSON file and the same as Markdown beside it, anew
after every row. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from gloo_ranks import RankPool  # noqa: E402
from step_wire_ranks import as_rows, count  # noqa: E402

from vqmoe_megatron.bench.origin import commit_in_words, origin  # noqa: E402
from vqmoe_megatron.config.recipe import load_recipe  # noqa: E402
from vqmoe_megatron.data.corpus import load_corpus  # noqa: E402
from vqmoe_megatron.plan.layout import check_layout  # noqa: E402
from vqmoe_megatron.plan.step_wire import step_wire  # noqa: E402
from vqmoe_megatron.rundir.atomic import replace_file  # noqa: E402
from vqmoe_megatron.simulate.simulated_step import simulate_step  # noqa: E402

RECIPE = ROOT / "recipes" / "parity.yaml"
TP, PP, VPP, EP, ETP = (
    f"{name}_parallel_size"
    for name in (
        "tensor_model",
        "pipeline_model",
        "virtual_pipeline_model",
        "expert_model",
        "expert_tensor",
    )
)
ZERO = ["optimizer.use_distributed_optimizer=true"]
OVERLAP = [*ZERO, "optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]
EXPERTS_64 = [
    "model.num_moe_experts=64",
    "vq.num_codes=128",
    "train.global_batch_size=16",
    "optimizer.lr=3e-3",
]
# What quickstart trains, of parity's depth: rows of a code memory beside the rows of top-1 experts.
MEMORY = [
    "vq.path=continuous",
    "model.hidden_size=128",
    "model.num_moe_experts=16",
    "model.moe_router_topk=1",
    "model.seq_length=256",
    "code_memory.num_rows=4096",
    "code_memory.codes=tokens",
    "code_memory.layers=[1,3]",
]
# name: ranks, parallel sizes, overrides, steps of training
LAYOUTS: dict[str, tuple[int, dict[str, int], list[str], int]] = {
    "one rank": (1, {}, [], 3),
    "DP2": (2, {}, [], 3),
    "DP2, distributed optimizer": (2, {}, ZERO, 3),
    "DP2, distributed optimizer, overlapped": (2, {}, OVERLAP, 3),
    "EP2": (2, {EP: 2}, [], 3),
    "TP2": (2, {TP: 2}, [], 3),
    "ETP2": (2, {ETP: 2}, [], 3),
    "PP2": (2, {PP: 2}, [], 3),
    "PP2 x VPP2": (2, {PP: 2, VPP: 2}, [], 3),
    "TP2 x EP2": (4, {TP: 2, EP: 2}, [], 3),
    "TP2 x PP2 x EP2, bf16": (4, {TP: 2, PP: 2, EP: 2}, [*OVERLAP, "model.bf16=true"], 3),
    "EP8, 64 experts": (8, {EP: 8}, EXPERTS_64, 30),
} | {
    f"EP4, code memory, {num_samples * 256:,} tokens a rank": (
        4,
        {EP: 4},
        [
            *MEMORY,
            f"train.micro_batch_size={num_samples}",
            f"train.global_batch_size={4 * num_samples}",
        ],
        3,
    )
    for num_samples in (2, 8, 32)
}
# The same with all rows gathered, as if even reads decided (plan/distinct_rows.py).
LAYOUTS["EP4, code memory, 8,192 tokens a rank, exchange=table"] = (
    4,
    {EP: 4},
    [*LAYOUTS["EP4, code memory, 8,192 tokens a rank"][2], "code_memory.exchange=table"],
    3,
)
BIG = [
    "model.vocab_size=128000",
    "model.bf16=true",
    "model.num_attention_heads=64",
    "model.seq_length=4096",
    "model.gated_linear_unit=true",
    "model.activation_func=silu",
    "model.add_bias_linear=false",
    "model.normalization=RMSNorm",
    *OVERLAP,
]
LARGE: dict[str, tuple[int, dict[str, int], list[str]]] = {
    "64 experts on 64 ranks": (
        64,
        {TP: 2, PP: 2, EP: 8},
        [
            *BIG,
            "model.num_layers=16",
            "model.hidden_size=2048",
            "model.moe_ffn_hidden_size=4096",
            "model.num_moe_experts=64",
            "vq.num_codes=512",
            "train.global_batch_size=256",
        ],
    ),
    "128 experts on 512 ranks": (
        512,
        {TP: 4, PP: 4, EP: 32},
        [
            *BIG,
            "model.num_layers=32",
            "model.hidden_size=4096",
            "model.moe_ffn_hidden_size=8192",
            "model.num_moe_experts=128",
            "vq.num_codes=1024",
            "train.global_batch_size=1024",
        ],
    ),
    "256 experts on 4,096 ranks": (
        4096,
        {TP: 8, PP: 8, EP: 64},
        [
            *BIG,
            "model.num_layers=64",
            "model.hidden_size=8192",
            "model.moe_ffn_hidden_size=16384",
            "model.num_moe_experts=256",
            "vq.num_codes=4096",
            "train.global_batch_size=4096",
        ],
    ),
}


def main() -> int:
    """Measure the chosen rows and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="of vqmoe prepare")
    parser.add_argument("--json", type=Path, required=True, help="written, with .md beside it")
    parser.add_argument("--only", nargs="*", help="names of rows; others stay as the file has them")
    arguments = parser.parse_args()
    vocab_size = load_corpus(arguments.corpus).vocab_size
    found: dict[str, Any] = {**origin(), "load_average": os.getloadavg()[0], "rows": []}
    if arguments.only and arguments.json.exists():
        found["rows"] = json.loads(arguments.json.read_text())["rows"]
    is_equal = True
    for name in [*LAYOUTS, *LARGE]:
        if arguments.only and name not in arguments.only:
            continue
        if name in LAYOUTS:
            row = measured_row(name, arguments.corpus.resolve(), vocab_size)
        else:
            row = simulated_row(name)
        is_equal = is_equal and row["matches"]
        print(_line(row), flush=True)
        order = [*LAYOUTS, *LARGE]
        rows = [r for r in found["rows"] if r["name"] in order and r["name"] != name] + [row]
        found["rows"] = sorted(rows, key=lambda r: order.index(r["name"]))
        _write(found, arguments.json)
    return 0 if is_equal else 1


def measured_row(name: str, corpus: Path, vocab_size: int) -> dict[str, Any]:
    """Plan, simulation and count of one layout that runs here."""
    num_ranks, sizes, overrides, num_steps = LAYOUTS[name]
    overrides = [
        f"model.vocab_size={vocab_size}",
        "train.global_batch_size=4",
        f"train.train_iters={num_steps + 1}",
        "optimizer.lr_warmup_iters=1",
        *overrides,
        *(f"parallel.{key}={size}" for key, size in sizes.items()),
    ]
    config = load_recipe(RECIPE, overrides)
    planned = step_wire(config, check_layout(config, num_ranks, "cpu"))
    simulated = simulate_step(config, num_ranks, all_microbatches=True)
    pool = RankPool(num_ranks)
    try:
        counted = pool.run(
            count,
            str(RECIPE),
            overrides,
            str(corpus),
            num_steps,
            layout=sizes,
            timeout_seconds=3000,
        )
    finally:
        pool.close()
    plan = {stage.pipeline_rank: as_rows(stage.by_collective) for stage in planned.stages}
    simulation = {rank.pipeline_rank: as_rows(rank.counted) for rank in simulated.ranks}
    losses = counted[0]["losses"]
    return {
        "name": name,
        "num_ranks": num_ranks,
        "overrides": overrides,
        "planned_bytes": str(planned.sent_bytes),
        "simulated_bytes": str(max(rank.sent_bytes for rank in simulated.ranks)),
        "counted_bytes": str(max(_total(rank["balanced"]) for rank in counted)),
        "plan_by_stage": plan,
        "simulation_by_stage": simulation,
        "count_by_rank": [rank["balanced"] for rank in counted],
        "trained_steps": num_steps,
        "steps_whose_bytes_differ_from_the_formulas": sum(len(r["unequal_steps"]) for r in counted),
        "routed_bytes": str(max(Fraction(b) for r in counted for b in r["sent_bytes_of_steps"])),
        "routed_by_rank": [rank["last_step"] for rank in counted],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "matches": simulated.matches
        and all(rank["balanced"] == plan[rank["pipeline_rank"]] for rank in counted)
        and not any(rank["unequal_steps"] for rank in counted),
    }


def simulated_row(name: str) -> dict[str, Any]:
    """Plan and simulation of one large world."""
    num_ranks, sizes, overrides = LARGE[name]
    overrides = [*overrides, *(f"parallel.{key}={size}" for key, size in sizes.items())]
    config = load_recipe(RECIPE, overrides)
    simulated = simulate_step(config, num_ranks)
    return {
        "name": name,
        "num_ranks": num_ranks,
        "overrides": overrides,
        "planned_bytes": str(simulated.planned.sent_bytes),
        "simulated_bytes": str(max(rank.sent_bytes for rank in simulated.ranks)),
        "num_microbatches": simulated.num_microbatches,
        "num_microbatches_of_run": simulated.num_microbatches_of_run,
        "simulated_ranks": [rank.rank for rank in simulated.ranks],
        "num_parameters_of_ranks": [rank.num_parameters for rank in simulated.ranks],
        "plan_by_stage": {
            rank.pipeline_rank: as_rows(simulated.planned.stages[rank.pipeline_rank].by_collective)
            for rank in simulated.ranks
        },
        "simulation_by_stage": {r.pipeline_rank: as_rows(r.counted) for r in simulated.ranks},
        "seconds": simulated.seconds,
        "cpu_seconds": simulated.cpu_seconds,
        "peak_memory_bytes": simulated.peak_memory_bytes,
        "matches": simulated.matches,
    }


def _total(table: list[list[Any]]) -> Fraction:
    return sum((Fraction(sent) for *_, sent in table), Fraction(0))


def memory_share(row: dict[str, Any]) -> Fraction | None:
    """Bytes of the memory's rows over those of the experts' rows, there and back, all ranks' last
    step; None without a memory."""
    rows = [line for rank in row.get("routed_by_rank", []) for line in rank]
    collectives = "all_to_all", "all_gather", "reduce_scatter"
    memory, experts = (
        _total([line for line in rows if line[0] in collectives and line[1] == axis])
        for axis in ("expt_tp_ep", "ep")
    )
    return memory / experts if memory and experts else None


def _line(row: dict[str, Any]) -> str:
    sides = [f"{key.removesuffix('_bytes')} {_shown(row[key])}" for key in _sides(row)]
    return f"{row['name']}: {', '.join(sides)}: {'equal' if row['matches'] else 'NOT EQUAL'}"


def _sides(row: dict[str, Any]) -> list[str]:
    return [key for key in ("planned_bytes", "simulated_bytes", "counted_bytes") if key in row]


def _shown(amount: str) -> str:
    value = Fraction(amount)
    return f"{int(value):,}" if value.denominator == 1 else f"{float(value):,.2f}"


def _write(found: dict[str, Any], file: Path) -> None:
    for target, text in (
        (file, json.dumps(found, indent=1) + "\n"),
        (file.with_suffix(".md"), markdown(found)),
    ):
        replace_file(target, text)


def markdown(found: dict[str, Any]) -> str:
    """Return both tables with their origin."""
    measured = [row for row in found["rows"] if "counted_bytes" in row]
    large = [row for row in found["rows"] if "counted_bytes" not in row]
    lines = [
        "# Bytes of a whole optimizer step",
        "",
        "`python benchmarks/step_wire.py`: bytes that the busiest rank sends in one step of",
        "`recipes/parity.yaml` (4 layers, fp32, global batch 4, for EP8 16; with a code memory",
        "hidden size 128 and 16 top-1 experts). Planned, simulated",
        "and counted use balanced routing and are compared collective by collective, calls and",
        "bytes, on every rank. `routed` is the largest step with the model's own routing, where",
        "the formulas are told how many rows travelled and must give the bytes of every step of",
        "every rank.",
        f"{found['machine']['cores']} cores, load {found['load_average']:.0f} at the start, torch "
        f"{found['versions']['torch']}, megatron-core {found['versions']['megatron-core']}; the "
        f"rows measured last are of commit {commit_in_words(found)}.",
        "",
        "| layout | ranks | planned | simulated | counted | equal | routed | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        amounts = " | ".join(_shown(row[key]) for key in _sides(row))
        loss = f"{row['first_loss']:.3f} to {row['last_loss']:.3f} in {row['trained_steps']} steps"
        equal = "yes" if row["matches"] else "NO"
        lines.append(
            f"| {row['name']} | {row['num_ranks']} | {amounts} | {equal} | "
            f"{_shown(row['routed_bytes'])} | {loss} |"
        )
    shares = {row["name"]: memory_share(row) for row in measured}
    lines += [
        "",
        "Memory in two of the four layers: bytes of its rows over those of top-1 dispatch in all",
        "four, counted in the last step: "
        + "; ".join(f"{name}: {float(s):.3f}" for name, s in shares.items() if s is not None)
        + ".",
    ]
    lines += [
        "",
        "Worlds that are simulated only: bf16, sequence length 4,096, fake tensors, one rank of",
        "every pipeline stage that differs. Time and memory are those of the process that",
        "simulates them all, imports included.",
        "",
        "| world | parameters of a rank | planned | simulated | equal | microbatches | s | "
        "processor s | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in large:
        amounts = " | ".join(_shown(row[key]) for key in _sides(row))
        lines.append(
            f"| {row['name']} | {max(row['num_parameters_of_ranks']) / 1e9:.2f} G | {amounts} | "
            f"{'yes' if row['matches'] else 'NO'} | {row['num_microbatches']} of "
            f"{row['num_microbatches_of_run']} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | "
            f"{row['peak_memory_bytes'] / 1e6:.0f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
