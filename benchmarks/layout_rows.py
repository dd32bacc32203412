"""The rows and variants of ``layout_matrix.py``: layouts of recipes/parity.yaml up to 8 ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

TP, PP, EP = (f"{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert"))
VPP, ETP = "virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size"
CP = "context_parallel_size"
DISTRIBUTED = ("optimizer.use_distributed_optimizer=true",)
OVERLAP = ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")
FULL_RECOMPUTE = (
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
)
PER_TOKEN = ("model.calculate_per_token_loss=true",)

VARIANTS = {
    f"{path}-{expert_input}-{update}": (
        f"vq.path={path}",
        f"vq.expert_input={expert_input}",
        f"vq.codebook_update={update}",
    )
    for path, expert_input, update in product(
        ("dual", "discrete"), ("code", "blend"), ("gradient", "ema")
    )
} | {
    # What quickstart and the scale recipes train: top-1 and a memory whose reads travel as rows.
    "default": (
        "model.moe_router_topk=1",
        "vq.path=continuous",
        "code_memory.num_rows=64",
        "code_memory.layers=[1,3]",
        "code_memory.exchange=rows",
    ),
    "top1": ("model.moe_router_topk=1", "vq.path=continuous"),
    "filled-threshold": ("model.moe_router_topk=1", "vq.path=filled", "vq.threshold_routing=true"),
}

# Rows of an option repeat a layout's sizes: two variants that share no setting.
OPTION_VARIANTS = ("dual-code-ema", "discrete-blend-gradient")


@dataclass(frozen=True)
class Layout:
    """One row: ranks, Megatron's sizes, and settings that must not change the result.

    ``both``: settings that do change it, and that the run of one rank gets too.
    """

    num_ranks: int
    sizes: dict[str, int] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    is_option: bool = False

    def size(self, name: str) -> int:
        """Return one of Megatron's sizes; 1 unless set."""
        return self.sizes.get(name, 1)

    @property
    def data_parallel_size(self) -> int:
        """DP = ranks / (TP * PP * CP)."""
        return self.num_ranks // (self.size(TP) * self.size(PP) * self.size(CP))

    @property
    def options(self) -> str:
        """The settings, without their section."""
        return ", ".join(item.split(".", 1)[1] for item in (*self.settings, *self.both)) or "-"


LAYOUTS = {
    "dp2": Layout(2),
    "dp2-do": Layout(2, {}, DISTRIBUTED),
    "ep2": Layout(2, {EP: 2}),
    "ep2-do": Layout(2, {EP: 2}, DISTRIBUTED),
    "tp2": Layout(2, {TP: 2}),
    "tp2-ep2": Layout(2, {TP: 2, EP: 2}),
    "tp2-etp2": Layout(2, {TP: 2, ETP: 2}),
    "pp2": Layout(2, {PP: 2}),
    "pp2-vpp2": Layout(2, {PP: 2, VPP: 2}),
    "cp2": Layout(2, {CP: 2}),
    "cp2-ep2": Layout(4, {CP: 2, EP: 2}),
    "cp4-ep2-do": Layout(4, {CP: 4, EP: 2}, DISTRIBUTED),
    "tp2-cp2": Layout(4, {TP: 2, CP: 2}),
    "pp2-cp2-ep2": Layout(4, {PP: 2, CP: 2, EP: 2}),
    "dp4-ep2-do": Layout(4, {EP: 2}, DISTRIBUTED),
    "dp4-ep4": Layout(4, {EP: 4}),
    "tp2-dp2-ep4-do": Layout(4, {TP: 2, EP: 4}, DISTRIBUTED),
    "tp2-dp2-ep2-etp2": Layout(4, {TP: 2, EP: 2, ETP: 2}),
    "tp2-pp2": Layout(4, {TP: 2, PP: 2}),
    "pp2-dp2-ep2": Layout(4, {PP: 2, EP: 2}),
    "pp2-vpp2-dp2-ep2-do": Layout(4, {PP: 2, VPP: 2, EP: 2}, DISTRIBUTED),
    "tp2-pp2-dp2-ep2-etp2-do": Layout(8, {TP: 2, PP: 2, EP: 2, ETP: 2}, DISTRIBUTED),
    "tp2-pp2-dp2-ep4": Layout(8, {TP: 2, PP: 2, EP: 4}),
    "tp2-pp2-vpp2-dp2-ep4-do": Layout(8, {TP: 2, PP: 2, VPP: 2, EP: 4}, DISTRIBUTED),
    "recompute-full": Layout(2, {TP: 2, EP: 2}, FULL_RECOMPUTE, is_option=True),
    "recompute-selective": Layout(2, {EP: 2}, ("model.recompute_granularity=selective",), (), True),
    "overlap": Layout(4, {EP: 2}, DISTRIBUTED + OVERLAP, is_option=True),
    "per-token-loss": Layout(4, {TP: 2, EP: 2}, (), PER_TOKEN, True),
}
