"""Mistakes that the fast tier must see: each is made in a copy of the tree, and a test must fail.

    python tests/mutants.py                    every mistake, its tests in the fast tier
    python tests/mutants.py --only exchange    those with that word in their name

Prints the table of docs/testing.md. ``test_mutants.py`` keeps the list true: each place stands in
the source exactly once.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN_LINES = 30  # of a mistake that nothing saw


@dataclass(frozen=True)
class Mutant:
    """One mistake: ``old`` becomes ``new`` in ``file``; ``tests`` is where it must be seen."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    # VQ: search, losses, moving codebooks
    Mutant(
        "search: distances without the codes' norms",
        "vq/search.py",
        "half_norms = codes.square().sum(dim=1).mul_(0.5)",
        "half_norms = codes.square().sum(dim=1).mul_(0.0)",
        "tests/vq/test_search.py",
    ),
    Mutant(
        "loss: the codebook loss moves codes away from their tokens",
        "vq/losses.py",
        "dv.mul_(-factor * at_codebook)",
        "dv.mul_(factor * at_codebook)",
        "tests/vq/test_losses.py",
    ),
    Mutant(
        "loss: commitment_coeff forgotten",
        "moe/code_assigner.py",
        "loss = self.vq.commitment_coeff * commitment",
        "loss = 1.0 * commitment",
        "tests/moe/test_layer_equality.py",
    ),
    Mutant(
        "loss: not divided by TP under sequence parallelism",
        "moe/code_assigner.py",
        "loss = mean * (coeff / num_parts)",
        "loss = mean * coeff",
        "tests/moe/test_layer_equality.py",
    ),
    Mutant(
        "EMA: sums stay those of the first step",
        "vq/codebook.py",
        "torch.where(moves, new.ema_sum, old.ema_sum)",
        "torch.where(moves, old.ema_sum, old.ema_sum)",
        "tests/vq/test_codebook.py",
    ),
    Mutant(
        "EMA: not a fraction of the step's tokens",
        "vq/codebook_update.py",
        "statistics.total / num_tokens[:, None, None]",
        "statistics.total",
        "tests/vq/test_codebook_update.py",
    ),
    Mutant(
        "revival: every step draws the same replacements",
        "vq/codebook.py",
        "self.num_steps += torch.isnan(statistics.count).any() | has_tokens",
        "self.num_steps += 0 * has_tokens",
        "tests/vq/test_codebook.py",
    ),
    Mutant(
        "revival: candidates of one TP shard only",
        "moe/candidates.py",
        "if num_offered <= 0 or (",
        "if num_offered <= 0 or groups.tp.rank() or (",
        "tests/moe/test_codebook_sync.py",
    ),
    Mutant(
        "code map: blocks instead of code mod N",
        "vq/code_map.py",
        "torch.arange(num_rows, dtype=torch.int64) % num_experts",
        "torch.arange(num_rows, dtype=torch.int64) * num_experts // num_rows",
        "tests/vq/test_code_map.py",
    ),
    # Code memory
    Mutant(
        "code memory: a row's owner is off by one",
        "moe/memory/row_plan.py",
        "expert, number = rows % self.num_experts, rows // self.num_experts",
        "expert, number = (rows + 1) % self.num_experts, rows // self.num_experts",
        "tests/moe/memory/test_row_plan.py",
    ),
    Mutant(
        "code memory: the start of a document is dropped",
        "vq/row_addresses.py",
        "torch.where(starts, places, torch.zeros_like(places))",
        "torch.where(starts & False, places, torch.zeros_like(places))",
        "tests/vq/test_row_addresses.py",
    ),
    Mutant(
        "code memory: a recomputed layer reads the latest microbatch's rows",
        "moe/memory/microbatches.py",
        "return self._differentiated if is_in_backward() else self._latest",
        "return self._latest",
        "tests/moe/memory/test_attach.py",
    ),
    Mutant(
        "code memory: a code without entries joins another's",
        "vq/vocabulary_codes.py",
        "torch.where(is_apart, weights * squared, torch.zeros_like(squared))",
        "weights * squared",
        "tests/vq/test_vocabulary_codes.py",
    ),
    # The step's statistics
    Mutant(
        "sync: the statistics' all-reduce is dropped",
        "moe/codebook_sync.py",
        "torch.distributed.all_reduce(part, group=group)",
        "pass",
        "tests/moe/test_codebook_sync.py",
    ),
    Mutant(
        "purity: a number comes from pageable memory in every microbatch",
        "moe/layer.py",
        "discrete.new_full((), num_tokens)",
        "discrete.new_tensor(num_tokens)",
        "tests/runtime/test_device_purity.py",
    ),
    Mutant(
        "purity: a codebook's step count is read in every step",
        "vq/codebook.py",
        "self._steps_taken.read(self.num_steps)",
        "int(self.num_steps)",
        "tests/runtime/test_device_purity.py",
    ),
    Mutant(
        "purity: places of candidates are made on the host",
        "moe/candidates.py",
        "of_span = torch.arange(*ends, device=device)",
        "of_span = torch.arange(*ends)",
        "tests/runtime/test_device_purity.py",
    ),
    Mutant(
        "memory: statistics are reduced in a copy",
        "moe/codebook_sync.py",
        "parts = [owner.local_parts() for owner in owners]",
        "parts = [[part.clone() for part in owner.local_parts()] for owner in owners]",
        "tests/moe/test_codebook_sync.py",
    ),
    Mutant(
        "memory: a node keeps its code table until the next microbatch",
        "moe/table_combine.py",
        "gradient, ctx.gradient = ctx.gradient, spent_gradient  # it holds the table",
        "gradient = ctx.gradient",
        "tests/plan/test_memory.py",
    ),
    Mutant(
        "sync: a recomputed forward pass is counted twice",
        "moe/code_assigner.py",
        "return run_in_backward(activation, lambda: self._record(assignment, losses))",
        "self._record(assignment, losses)\n        return activation",
        "tests/moe/test_codebook_sync.py",
    ),
    # Exchange and owners
    Mutant(
        "exchange: split sizes swapped",
        "moe/dispatch.py",
        "all_to_all(ep_group, arrived, output_splits, input_splits)",
        "all_to_all(ep_group, arrived, input_splits, output_splits)",
        "tests/moe/test_dispatch.py",
    ),
    Mutant(
        "exchange: rows return in the order of their arrival",
        "moe/dispatch.py",
        "rows = _Permute.apply(rows, receipt.regroup.inverse, receipt.regroup.order)",
        "rows = rows * 1",
        "tests/moe/test_dispatch.py",
    ),
    Mutant(
        "code space: a slot's owner is off by one",
        "moe/code_rows.py",
        "slot_of_row[order] = owner * num_slots +",
        "slot_of_row[order] = (owner + 1) % num_ranks * num_slots +",
        "tests/moe/test_code_rows.py",
    ),
    Mutant(
        "code space: the table's gradient is not summed over ranks",
        "moe/table_exchange.py",
        "torch.distributed.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)",
        "own.copy_(grad.chunk(ctx.group.size())[ctx.group.rank()])",
        "tests/moe/test_table_exchange.py",
    ),
    Mutant(
        "code space: a shard's gradient is not summed over ETP",
        "moe/table_exchange.py",
        "torch.distributed.all_reduce(grad, group=ctx.group)",
        "pass",
        "tests/moe/test_table_exchange.py",
    ),
    Mutant(
        "code space: a table kept for the step gives half its gradient",
        "moe/executions/step_table.py",
        "torch.zeros_like(built.values) if grad is None else grad",
        "torch.zeros_like(built.values) if grad is None else grad / 2",
        "tests/moe/test_step_table.py",
    ),
    Mutant(
        "experts: an output bias counted on every ETP rank",
        "moe/grouped_experts.py",
        "if self.bias2 is None or self.expt_tp_group.rank() == 0:",
        "if True:",
        "tests/moe/test_layer_equality.py",
    ),
    Mutant(
        "experts: gated shards saved as one piece",
        "moe/grouped_experts.py",
        'num_pieces = self.num_halves if name in ("weight1", "bias1") else 1',
        "num_pieces = 1",
        "tests/moe/test_expert_resharding.py",
    ),
    Mutant(
        "straight through: a group's sum in place of its mean",
        "moe/straight_through.py",
        "return both[:, :-1] / both[:, -1:].clamp(min=1.0)",
        "return both[:, :-1]",
        "tests/moe/test_straight_through.py",
    ),
    Mutant(
        "combine: the gate's weights change places",
        "moe/combine_gate.py",
        "return logits.softmax(dim=-1).unbind(dim=1)",
        "return logits.softmax(dim=-1).flip(1).unbind(dim=1)",
        "tests/moe/test_layer_equality.py",
    ),
    Mutant(
        "attention: tokens see those behind them",
        "moe/cpu_attention.py",
        "is_causal=is_causal,",
        "is_causal=False,",
        "tests/moe/test_cpu_attention.py",
    ),
    # Context parallelism
    Mutant(
        "context parallelism: the second chunk is that of another rank",
        "moe/context_cut.py",
        "return rank, 2 * size - 1 - rank",
        "return rank, size + rank",
        "tests/moe/test_context_cut.py",
    ),
    Mutant(
        "context parallelism: chunks are put together in the order of ranks",
        "moe/context_cut.py",
        "[*firsts, *reversed(seconds)]",
        "[*firsts, *seconds]",
        "tests/moe/test_context_cut.py",
    ),
    Mutant(
        "context parallelism: a chunk sees the keys behind its tokens",
        "moe/context_attention.py",
        "is_seen.tril(end - length)",
        "is_seen",
        "tests/moe/test_context_attention.py",
    ),
    Mutant(
        "context parallelism: candidates of the first chunk only",
        "moe/candidates.py",
        "for span in own_spans(num_local_tokens, groups.tp, groups.cp):",
        "for span in own_spans(num_local_tokens, groups.tp, groups.cp)[:1]:",
        "tests/moe/test_candidates.py",
    ),
    Mutant(
        "context parallelism: the mean of a rank's own mask",
        "tasks/pretrain.py",
        "return total * num_parts, whole_mask.sum().to(torch.int), report",
        "return total, loss_mask.sum().to(torch.int), report",
        "tests/tasks/test_pretrain.py",
    ),
    # The step, its data, its checkpoints
    Mutant(
        "step: the loss is one data-parallel rank's",
        "engines/megatron/step.py",
        "torch.distributed.all_reduce(sums, group=replicas)",
        "pass",
        "tests/train/test_layouts.py",
    ),
    Mutant(
        "step: the loss comes from the first pipeline stage",
        "engines/megatron/step.py",
        "src=parallel_state.get_pipeline_model_parallel_last_rank()",
        "src=parallel_state.get_pipeline_model_parallel_first_rank()",
        "tests/train/test_layouts.py",
    ),
    Mutant(
        "step: a stop that one rank sees is no stop",
        "engines/megatron/step.py",
        "torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)",
        "torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN)",
        "tests/train/test_stopping.py",
    ),
    Mutant(
        "step: a skipped step moves the codebooks",
        "engines/megatron/step.py",
        "self.codebook_sync.discard(self.model)",
        "self.codebook_sync.apply()",
        "tests/train/test_nan_policy.py",
    ),
    Mutant(
        "resume: the data begin again",
        "data/datasets.py",
        "start = self.consumed_samples + self.passed_over_samples",
        "start = self.passed_over_samples",
        "tests/train/test_stopping.py",
    ),
    Mutant(
        "evaluation: tokens that two windows share are scored twice",
        "data/evaluation_windows.py",
        "starts = np.where(windows == 0, 0, self.window_tokens - self.stride_tokens)",
        "starts = np.where(windows == 0, 0, 0)",
        "tests/data/test_evaluation_windows.py",
    ),
    Mutant(
        "checkpoints: written under their final name",
        "checkpoint/saver.py",
        'partial = checkpoints / f"{name}.{uuid.uuid4().hex[:8]}.incomplete"',
        "partial = checkpoints / name",
        "tests/train/test_stopping.py",
    ),
    Mutant(
        "checkpoints: one fewer is kept",
        "checkpoint/saver.py",
        "names[: -self.run.config.checkpoint.keep_last]",
        "names[: 1 - self.run.config.checkpoint.keep_last]",
        "tests/checkpoint/test_saver.py",
    ),
    # What is predicted and what is concluded
    Mutant(
        "plan: an all-reduce sends its bytes once",
        "plan/wire.py",
        "return others_share(2 * num_bytes, num_ranks)",
        "return others_share(num_bytes, num_ranks)",
        "tests/plan/test_wire.py",
    ),
    Mutant(
        "plan: a backward pass as long as the forward pass",
        "plan/flops.py",
        '"router": Flops(router, 2 * router),',
        '"router": Flops(router, router),',
        "tests/plan/test_flops.py",
    ),
    Mutant(
        "plan: an fp32 search at the rate of the tensor cores",
        "plan/search_kernels.py",
        '"fp32 products",\n            FP32_FMA,',
        '"fp32 products",\n            BF16_TENSOR_CORE,',
        "tests/plan/test_search_kernels.py",
    ),
    Mutant(
        "study: intervals with one degree of freedom too many",
        "study/report/intervals.py",
        "math.sqrt(squares / freedom)",
        "math.sqrt(squares / (freedom + 1))",
        "tests/study/report/test_intervals.py",
    ),
    # The run directory and what is told of it
    Mutant(
        "files: a replaced file is written in place",
        "rundir/atomic.py",
        'partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")',
        "partial = path",
        "tests/rundir/test_atomic.py",
    ),
    Mutant(
        "attempts: one without progress is queued again",
        "rundir/attempts.py",
        'if state == "running" and now <= start.iteration:',
        'if state == "running" and now < start.iteration:',
        "tests/rundir/test_attempts.py",
    ),
    Mutant(
        "metrics: a resumed run keeps the lost attempt's records",
        "track/metrics_log.py",
        "if its is not None and its <= iteration",
        "if its is not None",
        "tests/track/test_metrics_log.py",
    ),
    Mutant(
        "MLflow: an outage is taken for a refusal",
        "track/mlflow/store_retry.py",
        "if is_permanent(error):",
        "if True:",
        "tests/track/test_mlflow_outage.py",
    ),
)


def copied_tree(folder: Path) -> Path:
    """A copy of what git tracks, and what it would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def failed_test(tree: Path, mutant: Mutant) -> tuple[str | None, str]:
    """Make the mistake, run its tests of the fast tier until one fails; that test, and the output.

    The tree is mended again.
    """
    path = tree / "vqmoe_megatron" / mutant.file
    right = path.read_text()
    path.write_text(right.replace(mutant.old, mutant.new))
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutant.tests],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(right)
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(.+?)(?: - |$)", ended.stdout, re.MULTILINE)
    return (failed[1] if failed and ended.returncode == 1 else None), ended.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a mistake's name")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in mutant.name]
    num_unseen = 0
    print("| mistake | in | seen by | s |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        tree = copied_tree(Path(folder))
        for mutant in chosen:
            began = time.monotonic()
            test, output = failed_test(tree, mutant)
            num_unseen += test is None
            seen_by = f"`{test}`" if test else "**nothing**"
            seconds = time.monotonic() - began
            print(f"| {mutant.name} | `{mutant.file}` | {seen_by} | {seconds:.0f} |", flush=True)
            if test is None:
                print("\n".join(output.splitlines()[-SHOWN_LINES:]), file=sys.stderr)
    print(f"\n{len(chosen) - num_unseen} of {len(chosen)} seen by the fast tier")
    return 1 if num_unseen or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
