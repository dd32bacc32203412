"""Settings of the vector-quantised layer: a small frozen dataclass beside Megatron's config.

It is never a subclass of ``TransformerConfig``, so that the layer drops into any Megatron code.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config_checks import check_at_least, check_choice

LEGAL_VQ_VALUES: dict[str, tuple[str, ...]] = {
    "code_map": ("mod", "balanced", "clustered"),
    "quantizer": ("euclidean", "cosine", "product"),
    "expert_input": ("code", "blend", "blend_convex", "token"),
    "straight_through": ("token", "identity", "none"),
    "execution": ("auto", "tokens"),
    "path": ("dual", "discrete", "continuous"),
    "combine": ("softmax", "sigmoid"),
    "norm": ("none", "separate", "shared"),
    "codebook_update": ("gradient", "ema", "reanchor"),
    "init": ("data", "kmeans", "uniform"),
}


@dataclass(frozen=True)
class VQConfig:
    """Settings of the vector-quantised layer, passed beside Megatron's ``TransformerConfig``.

    See arXiv 2411.19402 for the method; ``docs/architecture.md`` names each toggle's source.
    """

    num_codes: int = 64  # K, codes per codebook
    num_code_slices: int = 1  # C, codes per token (quantizer: product)
    quantizer: str = "euclidean"
    code_map: str = "mod"
    expert_input: str = "code"
    contribution_rate: float = 0.05  # c of the blend inputs; the released value
    straight_through: str = "token"
    execution: str = "auto"
    path: str = "dual"
    combine: str = "softmax"
    combine_bias: float = 3.0  # initial logit in favour of the continuous path
    norm: str = "separate"
    codebook_update: str = "ema"
    ema_decay: float = 0.99
    commitment_coeff: float = 0.25  # van den Oord et al. 2017 (arXiv 1711.00937), eq. 3
    vq_loss_coeff: float = 0.08  # beta_vq of the released VQMoE scripts
    init: str = "data"
    dead_code_threshold: float = (
        0.05  # share of uniform usage under which a code is re-seeded; 0: off
    )
    freeze_codebook: bool = False

    def __post_init__(self) -> None:
        for name, legal in LEGAL_VQ_VALUES.items():
            value = getattr(self, name)
            if name == "execution" and value == "code_space":
                raise ValueError(self._code_space_rule())
            check_choice("vq", name, value, legal)
        check_at_least("vq", 1, num_codes=self.num_codes, num_code_slices=self.num_code_slices)
        check_at_least(
            "vq",
            0,
            commitment_coeff=self.commitment_coeff,
            vq_loss_coeff=self.vq_loss_coeff,
            dead_code_threshold=self.dead_code_threshold,
        )
        if not 0.0 <= self.contribution_rate <= 1.0:
            raise ValueError(f"vq.contribution_rate={self.contribution_rate} must lie in [0, 1]")
        if not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"vq.ema_decay={self.ema_decay} must lie strictly between 0 and 1")
        if self.dead_code_threshold >= 1.0:
            raise ValueError(
                f"vq.dead_code_threshold={self.dead_code_threshold} is a share of uniform usage "
                "and must be "
                "below 1, or every code would be re-seeded at every step"
            )
        if self.code_map != "mod" and self.init == "uniform":
            raise ValueError(
                f"vq.code_map={self.code_map} is built from the load and the codes of the first "
                "data, which vq.init=uniform never looks at; use init=data or kmeans, or "
                "code_map=mod"
            )
        if self.num_code_slices > 1 and self.quantizer != "product":
            raise ValueError(
                f"vq.num_code_slices={self.num_code_slices} needs vq.quantizer=product; "
                f"{self.quantizer} gives one code per token"
            )

    def _code_space_rule(self) -> str:
        reason = (
            f"with vq.expert_input={self.expert_input} every token has its own expert input, so "
            "one row per "
            "code cannot stand for it (code space is exact only for expert_input=code)"
            if self.expert_input != "code"
            else "this release executes the discrete path by token dispatch"
        )
        return (
            f"vq.execution=code_space cannot work here: {reason}; use vq.execution=tokens or auto"
        )

    def check_model(self, hidden_size: int, num_experts: int) -> None:
        """Raise ``ValueError`` for a combination that needs the model's sizes to be judged."""
        if hidden_size % self.num_code_slices:
            raise ValueError(
                f"hidden_size % vq.num_code_slices != 0: {hidden_size} % {self.num_code_slices} = "
                f"{hidden_size % self.num_code_slices}; product codes cut the hidden vector in "
                "equal slices"
            )
        rows = self.num_code_slices * self.num_codes
        if self.code_map != "mod" and rows % num_experts:
            raise ValueError(
                f"vq.code_map={self.code_map} keeps equal code counts per expert, but "
                "num_code_slices * "
                f"num_codes % num_moe_experts != 0: {rows} % {num_experts} = {rows % num_experts}; "
                "use code_map=mod or a multiple"
            )
        if self.path == "discrete" and rows < num_experts:
            raise ValueError(
                f"vq.path=discrete with {rows} codes leaves {num_experts - rows} of {num_experts} "
                "experts "
                "without any code; raise vq.num_codes or lower model.num_moe_experts"
            )
