"""The one table of metric names: what each means, its unit, how it is reduced, and who shows it.

Every writer (``metrics.jsonl``, MLflow, the console) and every reader (plots, studies, tests) takes
its names from here. A metric measured per layer exists twice: as an aggregate over layers
(``vq/code_perplexity``) and per layer (``vq/layer_03/code_perplexity``, Megatron's 1-based layer
number). "DP" in a reduction means the ranks that saw different tokens (data and context parallel).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

LAYER_NAME = re.compile(r"^(vq|moe)/layer_(\d{2,})/([a-z_]+)$")
# MLflow 3 accepts letters, digits, "_ - . space : /", no empty path part, at most 250 characters.
MLFLOW_NAME = re.compile(r"^[\w\-. :]+(/[\w\-. :]+)*$", re.ASCII)
MLFLOW_MAX_NAME_LENGTH = 250


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    ``console_format`` is a format spec, ``None``: not on the console. ``console_note`` stands
    behind the number there, where the name alone would be misread.
    """

    description: str
    unit: str
    reduction: str
    console_format: str | None = None
    per_layer: bool = False
    console_note: str = ""


_TOKEN_MEAN = "mean over the iteration's target tokens: microbatches, then DP; last pipeline stage"
_LAYER_MEAN = "per layer over all tokens of the iteration (microbatches, DP), then mean over layers"
_LAYER_SUM = "per layer over all tokens of the iteration (microbatches, DP), then sum over layers"
_RANK_0 = "mean over the steps since the last log, rank 0"
_NODE_0 = "mean over samples since the last log; rank 0's node only"
_SAME = "identical on every rank"

# fmt: off
METRIC_TABLE: dict[str, Metric] = {
    "iteration": Metric(
        "optimizer steps attempted so far, this one included", "iterations", _SAME),
    "timestamp_ms": Metric(
        "when the record was made, since 1970-01-01 UTC", "ms", "rank 0"),
    "consumed_tokens": Metric(
        "training tokens read since iteration 0", "tokens", "sum over microbatches and DP"),
    "consumed_samples": Metric(
        "training sequences read since iteration 0", "sequences", "sum over microbatches and DP"),
    "loss": Metric(
        "next-token cross-entropy of the training batch", "nats/token", _TOKEN_MEAN, ".4f"),
    "grad_norm": Metric(
        "global L2 norm of the gradient before clipping", "1",
        "root of the sum of squares over all parameters, each counted once", ".3f"),
    "learning_rate": Metric("learning rate used by this step", "1", _SAME, ".3e"),
    "tokens_per_second": Metric(
        "training throughput of the whole job", "tokens/s",
        "tokens of all DP ranks / wall time, since the last log", ".0f"),
    "step_time_ms": Metric("wall time of one step", "ms", _RANK_0, ".1f"),
    "overhead_share": Metric(
        "share of the step outside forward, backward, communication and optimizer", "1", _RANK_0),
    "skipped_iterations": Metric(
        "steps without an update (non-finite loss or gradient) so far", "iterations", _SAME),
    "val/loss": Metric(
        "next-token cross-entropy of the evaluation split", "nats/token",
        "mean over evaluation tokens: microbatches, then DP", ".4f"),
    "val/bits_per_byte": Metric(
        "val/loss / ln 2 x evaluated tokens / evaluated bytes", "bits/byte",
        "from the summed loss, tokens and bytes", ".4f"),
    "val/perplexity": Metric("exp(val/loss)", "1", "from the reduced val/loss", ".3f"),
    "vq/code_perplexity": Metric(
        "exp of the entropy of code usage; num_codes when usage is uniform", "codes",
        _LAYER_MEAN + "; product codes: mean over slices", ".1f", per_layer=True),
    "vq/dead_codes": Metric(
        "codes that no token of the step chose", "codes",
        _LAYER_SUM, ".0f", per_layer=True, console_note=" (sum of all layers)"),
    "vq/commitment_loss": Metric(
        "mean squared distance pulling tokens to their code, before its coefficient", "1",
        _LAYER_MEAN, per_layer=True),
    "vq/codebook_loss": Metric(
        "mean squared distance pulling codes to their tokens, before its coefficient", "1",
        _LAYER_MEAN, per_layer=True),
    "vq/combine_discrete_weight": Metric(
        "weight p_d of the discrete path in the combine", "1", _LAYER_MEAN, per_layer=True),
    "vq/assignment_change_rate": Metric(
        "share of the previous step's probe tokens whose code one codebook step changed", "1",
        _LAYER_MEAN, per_layer=True),
    "vq/revived_codes": Metric(
        "dead codes re-seeded since the last log", "codes",
        "sum over steps since the last log and over layers", per_layer=True),
    "moe/expert_load_imbalance": Metric(
        "tokens of the busiest expert / mean tokens per expert; 1 is balanced", "1",
        _LAYER_MEAN, ".2f", per_layer=True),
    "moe/load_balancing_loss": Metric(
        "auxiliary load-balancing loss, before its coefficient", "1", _LAYER_MEAN, per_layer=True),
    "memory/peak_rss_bytes": Metric(
        "largest resident set of any rank's process so far", "bytes", "max over ranks"),
    "system/cpu_utilization_percentage": Metric(
        "busy share of all processors of rank 0's node", "%", _NODE_0),
    "system/memory_used_bytes": Metric(
        "memory of rank 0's node that cannot be had without swapping", "bytes", _NODE_0),
    "system/gpu_utilization_percentage": Metric(
        "share of time with a kernel running, mean over the node's GPUs", "%", _NODE_0),
    "system/gpu_memory_used_bytes": Metric(
        "memory in use on the fullest of the node's GPUs", "bytes", _NODE_0),
    "system/gpu_power_watts": Metric(
        "power drawn by all of the node's GPUs", "W", _NODE_0),
}
# fmt: on


def layer_metric_name(name: str, layer_number: int) -> str:
    """Return the per-layer spelling: ``vq/dead_codes``, 3 -> ``vq/layer_03/dead_codes``.

    ``layer_number`` is 1-based, as Megatron's. ``ValueError``: ``name`` has no per-layer variant.
    """
    if name not in METRIC_TABLE or not METRIC_TABLE[name].per_layer:
        legal = ", ".join(key for key, metric in METRIC_TABLE.items() if metric.per_layer)
        raise ValueError(f"{name!r} has no per-layer variant; those that have: {legal}")
    group, quantity = name.split("/")
    return f"{group}/layer_{layer_number:02d}/{quantity}"


def lookup_metric(name: str) -> Metric:
    """Return the row of ``name``, also for a per-layer spelling; ``ValueError`` when unknown."""
    match = LAYER_NAME.match(name)
    base = f"{match[1]}/{match[3]}" if match else name
    metric = METRIC_TABLE.get(base)
    if metric is None or (match and not metric.per_layer):
        near = difflib.get_close_matches(base, METRIC_TABLE, n=3, cutoff=0.5) or sorted(
            METRIC_TABLE
        )
        raise ValueError(
            f"unknown metric {name!r}; nearest known: {', '.join(near)} "
            "(a new metric needs a row in vqmoe_megatron/track/metric_table.py)"
        )
    return metric


def is_mlflow_name(name: str) -> bool:
    """Tell whether MLflow accepts ``name`` as a metric or parameter key."""
    parts = name.split("/")
    return (
        bool(MLFLOW_NAME.match(name))
        and len(name) <= MLFLOW_MAX_NAME_LENGTH
        and not {".", ".."} & set(parts)
    )


def check_metric_names(names: Iterable[str]) -> None:
    """Raise ``ValueError`` for the first name not in the table, or that MLflow would refuse."""
    for name in names:
        lookup_metric(name)
        if not is_mlflow_name(name):
            raise ValueError(
                f"MLflow refuses the metric name {name!r}: use letters, digits, _ - . space : /, "
                f"no empty part, at most {MLFLOW_MAX_NAME_LENGTH} characters"
            )
