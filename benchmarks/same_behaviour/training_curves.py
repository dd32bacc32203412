"""Training curves of ``recipes/parity.yaml``: variants of the layer at several layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from checkout import Checkout
from run_files import observe_run

RECIPE = "recipes/parity.yaml"
COMMON = ("train.global_batch_size=8", "train.device=cpu")
VARIANTS = {
    "dual": (),
    "discrete": ("vq.path=discrete", "vq.straight_through=group"),
    "blend": ("vq.expert_input=blend", "vq.combine=sigmoid"),
    "product": ("vq.quantizer=product", "vq.num_code_slices=4"),
    "low_dim": ("vq.quantizer=low_dim", "vq.code_dim=16"),
    "table_per_step": ("vq.table_per_step=true", "vq.code_input=learned"),
    "trained_codes": ("vq.codebook_update=gradient",),
    "tokens": ("vq.execution=tokens", "optimizer.use_distributed_optimizer=true"),
}
TP, PP, EP = (f"parallel.{name}_model_parallel_size=2" for name in ("tensor", "pipeline", "expert"))
VPP = "parallel.virtual_pipeline_model_parallel_size=2"
ETP = "parallel.expert_tensor_parallel_size=2"
LAYOUTS = {  # ranks, and their sizes
    "1 rank": (1, ()),
    "EP2": (2, (EP,)),
    "PP2 x VPP2": (2, (PP, VPP)),
    "TP2 x EP2 x ETP2": (4, (TP, EP, ETP)),
}
QUICK_VARIANTS, QUICK_LAYOUTS = ("dual", "product"), ("1 rank", "EP2")


def pretrain(
    checkout: Checkout, run_dir: str, corpus: str, layout: str, overrides: Sequence[str]
) -> list[str]:
    """Train in the work folder; return what failed."""
    num_ranks, sizes = LAYOUTS[layout]
    ended = checkout.run(
        "pretrain",
        RECIPE,
        f"data.path={corpus}",
        f"train.output_dir={run_dir}",
        *COMMON,
        *sizes,
        *overrides,
        "--nproc",
        str(num_ranks),
    )
    if ended.returncode == 0:
        return []
    return [f"exit code {ended.returncode}: {checkout.stable(ended.stdout)[-500:]}"]


def observe_curve(checkout: Checkout, variant: str, layout: str) -> dict[str, Any]:
    """Train 20 iterations; return everything that the run directory holds."""
    if failures := pretrain(checkout, "runs/curve", checkout.corpus, layout, VARIANTS[variant]):
        return {"failures": failures}
    return observe_run(checkout, "runs/curve")
