"""The one table of metrics: what each means, its unit, how it is reduced, and who shows it.

Every writer (``metrics.jsonl``, trackers, the console, Megatron's MoE log) and every reader (plots,
studies, tests) takes names and reductions from here. A new metric is a row here and the line that
computes it. A package of the user's brings its rows along as entry points ``metric.LABEL``, each
naming a :class:`Metric` or :class:`LayerMetric`; the registry says how.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable

from vqmoe_megatron import registry
from vqmoe_megatron.metrics.metric import LAYER_NAME, LayerMetric, Metric

_TOKEN_MEAN = "mean over the iteration's target tokens: microbatches, then DP; last pipeline stage"
_RANK_0 = "mean over the steps since the last log, rank 0"
_NODE_0 = "mean over samples since the last log; rank 0's node only"
_SAME = "identical on every rank"

# fmt: off
OUR_METRICS: tuple[Metric, ...] = (
    Metric("iteration",
        "optimizer steps attempted so far, this one included", "iterations", _SAME),
    Metric("timestamp_ms",
        "when the record was made, since 1970-01-01 UTC", "ms", "rank 0"),
    Metric("consumed_tokens",
        "training tokens read since iteration 0", "tokens", "sum over microbatches and DP"),
    Metric("consumed_samples",
        "training sequences read since iteration 0", "sequences", "sum over microbatches and DP"),
    Metric("loss",
        "next-token cross-entropy of the training batch", "nats/token", _TOKEN_MEAN, ".4f"),
    Metric("grad_norm",
        "global L2 norm of the gradient before clipping", "1",
        "root of the sum of squares over all parameters, each counted once", ".3f"),
    Metric("learning_rate", "learning rate used by this step", "1", _SAME, ".3e"),
    Metric("tokens_per_second",
        "training throughput of the whole job", "tokens/s",
        "tokens of all DP ranks / wall time, since the last log", ".0f"),
    Metric("step_time_ms", "wall time of one step", "ms", _RANK_0, ".1f"),
    Metric("overhead_share",
        "share of the step outside forward, backward, communication and optimizer", "1", _RANK_0),
    Metric("skipped_iterations",
        "steps without an update (non-finite loss or gradient) so far", "iterations", _SAME),
    Metric("val/loss",
        "next-token cross-entropy of the evaluation split", "nats/token",
        "mean over evaluation tokens: microbatches, then DP", ".4f"),
    Metric("val/bits_per_byte",
        "val/loss / ln 2 x evaluated tokens / evaluated bytes", "bits/byte",
        "from the summed loss, tokens and bytes", ".4f"),
    Metric("val/perplexity", "exp(val/loss)", "1", "from the reduced val/loss", ".3f"),
    Metric("val/accuracy",
        "share of the evaluation split's texts (train.task=finetune) or images (images) whose "
        "class was found; loss and val/loss are then of those, not of tokens", "1",
        "from the counts of all ranks", ".4f"),
    LayerMetric("vq/code_perplexity",
        "exp of the entropy of code usage, num_codes when usage is uniform; mean over slices of "
        "product codes", "codes", console_format=".1f"),
    LayerMetric("vq/dead_codes",
        "codes that no token of the step chose", "codes",
        "sum", ".0f", console_note=" (sum of all layers)"),
    LayerMetric("vq/commitment_loss",
        "mean squared distance pulling tokens to their code, before its coefficient", "1"),
    LayerMetric("vq/codebook_loss",
        "mean squared distance pulling codes to their tokens, before its coefficient", "1"),
    LayerMetric("vq/combine_discrete_weight",
        "weight p_d of the discrete path in the combine", "1"),
    LayerMetric("vq/assignment_change_rate",
        "share of the previous step's probe tokens whose code one codebook step changed", "1",
        needs_update=True),
    LayerMetric("vq/revived_codes",
        "dead codes re-seeded since the last log", "codes",
        "sum", over_steps="sum", needs_update=True),
    LayerMetric("code_memory/stream_perplexity",
        "exp of the entropy of the step's tokens over codes of the embedding; one for the model, "
        "shown as layer 0", "codes", console_format=".1f", needs_update=True),
    LayerMetric("code_memory/stream_codes_in_use",
        "codes of the embedding with an entry that was seen so far", "codes", needs_update=True),
    LayerMetric("code_memory/context_perplexity",
        "exp of the entropy of the step's tokens over codes of their contexts", "codes",
        needs_update=True),
    LayerMetric("code_memory/stream_change_rate",
        "share of vocabulary entries whose code the step changed", "1", needs_update=True),
    LayerMetric("code_memory/stream_frozen",
        "1 once codes stay as they are (code_memory.freeze_after_steps)", "1", needs_update=True),
    LayerMetric("code_memory/distinct_rows",
        "distinct rows that a rank's microbatch reads, mean over the step's microbatches and "
        "ranks; known where rows travel (code_memory.exchange); one for the model, shown as layer "
        "0, with code_memory.codes=hidden of each layer", "rows"),
    LayerMetric("code_memory/rows_in_use",
        "share of rows that were read at least once since the process began", "1",
        console_format=".3f"),
    LayerMetric("code_memory/top_percent_reads",
        "share of all reads since the process began that fell on the 1 % most read rows", "1"),
    LayerMetric("code_memory/hidden_code_perplexity",
        "as vq/code_perplexity, of the memory's codes of hidden states (code_memory.codes=hidden), "
        "as all of this name", "codes", console_format=".1f"),
    LayerMetric("code_memory/hidden_dead_codes",
        "as vq/dead_codes", "codes", "sum"),
    LayerMetric("code_memory/hidden_commitment_loss",
        "as vq/commitment_loss", "1"),
    LayerMetric("code_memory/hidden_codebook_loss",
        "as vq/codebook_loss", "1"),
    LayerMetric("code_memory/hidden_assignment_change_rate",
        "as vq/assignment_change_rate", "1", needs_update=True),
    LayerMetric("code_memory/hidden_revived_codes",
        "as vq/revived_codes", "codes", "sum", over_steps="sum", needs_update=True),
    LayerMetric("code_memory/hidden_codes_in_use",
        "as vq/codes_in_use", "codes", "sum", needs_update=True),
    LayerMetric("code_memory/hidden_codebook_frozen",
        "as vq/codebook_frozen", "1", needs_update=True),
    LayerMetric("vq/codes_in_use",
        "codes that had at least a tenth of uniform usage lately (moving average of vq.ema_decay, "
        "since the process began, not reset by revival, going on in frozen codebooks)", "codes",
        "sum", needs_update=True),
    LayerMetric("vq/codebook_frozen",
        "1 where the step had to leave the codebook as it is, by vq.freeze_after_steps or "
        "vq.freeze_codebook", "1", needs_update=True),
    LayerMetric("moe/expert_load_imbalance",
        "tokens of the busiest expert / mean tokens per expert; 1 is balanced", "1",
        console_format=".2f"),
    LayerMetric("moe/exact_experts_per_token",
        "experts that see a token themselves, by threshold routing; held at 1", "1"),
    LayerMetric("moe/routing_threshold",
        "score above which an expert sees a token (vq.threshold_routing); 0 before the first step",
        "1"),
    LayerMetric("moe/tokens_without_exact_expert",
        "share of tokens that no expert sees, by threshold routing", "1"),
    LayerMetric("moe/tokens_with_one_exact_expert",
        "share of tokens that one expert sees, by threshold routing", "1"),
    LayerMetric("moe/tokens_with_several_exact_experts",
        "share of tokens that two experts or more see, by threshold routing", "1"),
    LayerMetric("moe/router_topk",
        "experts that a token visits, of model.moe_router=smoe_dropout; it grows", "1"),
    LayerMetric("moe/dropped_tokens",
        "share of tokens over their expert's capacity, whose weight is zero (switch)", "1"),
    LayerMetric("moe/expert_bias_spread",
        "largest less smallest bias of the experts (loss_free)", "1"),
    LayerMetric("moe/distillation_loss",
        "cross-entropy of the light router to the learned one's choice (stable_moe, stage 1)", "1"),
    LayerMetric("moe/light_router_agreement",
        "share of tokens for which both routers choose one expert (stable_moe, stage 1)", "1"),
    LayerMetric("moe/routing_frozen",
        "1 once experts follow token ids for good (stable_moe, stage 2)", "1"),
    Metric("moe/load_balancing_loss",
        "auxiliary load-balancing loss, before its coefficient", "1",
        "mean over the steps since the last log, their tokens (microbatches, DP) and MoE layers"),
    Metric("memory/peak_rss_bytes",
        "largest resident set of any rank's process so far", "bytes", "max over ranks"),
    Metric("system/cpu_utilization_percentage",
        "busy share of all processors of rank 0's node", "%", _NODE_0),
    Metric("system/memory_used_bytes",
        "memory of rank 0's node that cannot be had without swapping", "bytes", _NODE_0),
    Metric("system/gpu_utilization_percentage",
        "share of time with a kernel running, mean over the node's GPUs", "%", _NODE_0),
    Metric("system/gpu_memory_used_bytes",
        "memory in use on the fullest of the node's GPUs", "bytes", _NODE_0),
    Metric("system/gpu_power_watts",
        "power drawn by all of the node's GPUs", "W", _NODE_0),
)
# fmt: on

# The last part of the names of those that say what a process has seen since it began: of a run that
# was stopped and resumed they differ for a while from those of a run left alone.
SINCE_START_METRICS = (
    "/assignment_change_rate", "/codes_in_use", "/rows_in_use", "/top_percent_reads",
)  # fmt: skip


def metric_table() -> dict[str, Metric]:
    """Every row by name: ours, then those of installed packages.

    Raises:
        ValueError: for an entry point that is no row, or a row whose name is taken; says which.
    """
    return _table(registry.names("metric"))


@functools.cache
def _table(labels: tuple[str, ...]) -> dict[str, Metric]:
    table = {row.name: row for row in OUR_METRICS}
    taken = set().union(*map(_words, OUR_METRICS))
    for label in labels:
        row = registry.load("metric", label)
        where = f"entry point metric.{label} of group {registry.GROUP}"
        if taken & _words(row):
            raise ValueError(
                f"{where}: the name {row.name}, or what stands behind its /, is another metric's; "
                "choose another"
            )
        table[row.name] = row
        taken |= _words(row)
    return table


def _words(row: Metric) -> set[str]:
    """What no other row may be called: its name, and of a layer's also its scalar."""
    return {row.name, f"/{row.scalar}"} if isinstance(row, LayerMetric) else {row.name}


def layer_metrics() -> dict[str, LayerMetric]:
    """The rows of layers, by what a layer calls them."""
    rows = metric_table().values()
    return {row.scalar: row for row in rows if isinstance(row, LayerMetric)}


def layer_metric(scalar: str) -> LayerMetric:
    """Return the row of a layer's scalar; ``ValueError`` when there is none."""
    rows = layer_metrics()
    if scalar not in rows:
        raise ValueError(
            f"a layer gives a scalar {scalar!r} that has no row; known: {', '.join(rows)} "
            f"({_WHERE_TO_ADD})"
        )
    return rows[scalar]


def lookup_metric(name: str) -> Metric:
    """Return the row of ``name``, also for a per-layer spelling; ``ValueError`` when unknown."""
    table = metric_table()
    match = LAYER_NAME.match(name)
    base = f"{match[1]}/{match[3]}" if match else name
    metric = table.get(base)
    if metric is None or (match and not isinstance(metric, LayerMetric)):
        near = difflib.get_close_matches(base, table, n=3, cutoff=0.5) or sorted(table)
        raise ValueError(
            f"unknown metric {name!r}; nearest known: {', '.join(near)} ({_WHERE_TO_ADD})"
        )
    return metric


def check_metric_names(names: Iterable[str]) -> None:
    """Raise ``ValueError`` for the first name that is not in the table."""
    for name in names:
        lookup_metric(name)


_WHERE_TO_ADD = (
    "a new metric needs a row in vqmoe_megatron/metrics/table.py, or an entry point metric.LABEL"
)
