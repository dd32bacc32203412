"""Settings of the vector-quantised layer: a small frozen dataclass beside Megatron's config.

It is never a subclass of ``TransformerConfig``, so that the layer drops into any Megatron code.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron import registry
from vqmoe_megatron.config.checks import check_choice, check_settings
from vqmoe_megatron.config.fill_rules import check_fill, check_fill_model, fill_in_words
from vqmoe_megatron.config.quantizer_rules import IMPLICIT, SUMMED, check_quantizer

LEGAL_VQ_VALUES: dict[str, tuple[str, ...]] = {
    "code_map": ("mod", "balanced", "clustered"),
    "expert_input": ("code", "blend", "blend_convex", "token"),
    "code_input": ("codebook", "learned"),
    "straight_through": ("token", "group", "identity", "none"),
    "execution": ("auto", "tokens", "code_space"),
    "path": ("dual", "discrete", "continuous", "filled"),
    "fill_values": ("experts", "detached", "direct"),
    "combine": ("softmax", "sigmoid"),
    "norm": ("none", "separate", "shared", "shared_with_block"),
    "codebook_update": ("gradient", "ema", "reanchor"),
    "init": ("data", "kmeans", "uniform"),
    "revival": ("random", "error"),
}


@dataclass(frozen=True)
class VQConfig:
    """Settings of the vector-quantised layer, passed beside Megatron's ``TransformerConfig``.

    See arXiv 2411.19402 for the method; ``docs/architecture.md`` names each toggle's source.
    """

    num_codes: int = 64  # K, codes per codebook
    num_code_slices: int = 1  # C, codes per token (quantizer: product; depths of residual)
    quantizer: str = "euclidean"
    code_dim: int | None = None  # of the space that low_dim searches in; numbers of fsq and lfq
    fsq_levels: list[int] | None = None  # of fsq: levels of each number; num_codes is their product
    entropy_loss_coeff: float = 0.1  # of lfq; 0: off
    learn_code_scale: bool = False  # of cosine: the codes' length follows the codebook loss
    train_projection: bool = False  # of low_dim, fsq, lfq: rows of length one, turned by gradients
    code_map: str = "mod"
    expert_input: str = "code"
    code_input: str = "codebook"  # of expert_input=code
    contribution_rate: float = 0.05  # c of the blend inputs; the released value
    straight_through: str = "token"
    execution: str = "auto"  # auto: code_space where it is exact, else tokens
    table_per_step: bool = False  # code space: one table for all microbatches of a step
    overlap_table: bool = False  # code space: a microbatch's table is built during attention
    path: str = "dual"
    num_fill_experts: int | None = None  # filled: most likely experts that answer; None: all
    fill_values: str = "experts"  # filled: outputs of experts, the same detached, or learned rows
    threshold_routing: bool = False  # filled: one exact expert per token on average, not top-k
    combine: str = "softmax"
    combine_bias: float = 3.0  # initial logit in favour of the continuous path
    norm: str = "separate"
    codebook_update: str = "ema"
    ema_decay: float = 0.99
    commitment_coeff: float = 0.25  # van den Oord et al. 2017 (arXiv 1711.00937), eq. 3; 0: off
    vq_loss_coeff: float = 0.08  # beta_vq of the released VQMoE scripts; 0: neither loss
    init: str = "data"
    dead_code_threshold: float = (
        0.05  # share of uniform usage under which a code is re-seeded; 0: off
    )
    revival: str = "random"  # which tokens replace dead codes; error: those farthest from any code
    freeze_codebook: bool = False  # from the start
    freeze_after_steps: int | None = None  # optimizer steps after which the codebook stays

    def __post_init__(self) -> None:
        check_settings("vq", self)
        registry.check_name("quantizer", self.quantizer)
        takes = registry.takes("quantizer", self.quantizer)
        for name, legal in LEGAL_VQ_VALUES.items():
            check_choice("vq", name, getattr(self, name), legal)
        if self.code_map != "mod" and self.init == "uniform":
            raise ValueError(
                f"vq.code_map={self.code_map} is built from the load and the codes of the first "
                "data, which vq.init=uniform never looks at; use init=data or kmeans, or "
                "code_map=mod"
            )
        if (self.code_dim is not None) != ("code_dim" in takes):
            raise ValueError(
                f"vq.code_dim={self.code_dim} with vq.quantizer={self.quantizer}: low_dim needs "
                "the dimension it searches in, for instance code_dim=32, fsq and lfq how many "
                "numbers they round, and no other has one"
            )
        check_quantizer(self)
        check_fill(self)
        self._check_code_space()
        self._check_moves()
        if self.num_code_slices > 1 and "num_code_slices" not in takes:
            raise ValueError(
                f"vq.num_code_slices={self.num_code_slices} needs vq.quantizer=product or "
                f"residual; {self.quantizer} gives one code per token"
            )

    def _check_moves(self) -> None:
        """What decides whether codes move, and where dead ones go, must not contradict itself."""
        if self.freeze_codebook and self.freeze_after_steps is not None:
            raise ValueError(
                f"vq.freeze_codebook=true freezes from the start and vq.freeze_after_steps="
                f"{self.freeze_after_steps} later; set freeze_codebook=false, or leave "
                "freeze_after_steps out (null)"
            )
        if self.revival != "random":
            reason = ""
            if self.codebook_update == "reanchor":
                reason = "vq.codebook_update=reanchor pulls codes to anchors that it draws itself"
            elif self.freeze_codebook:
                reason = "vq.freeze_codebook=true never re-seeds a code"
            elif self.dead_code_threshold == 0:
                reason = "vq.dead_code_threshold=0 never re-seeds a code"
            if reason:
                raise ValueError(
                    f"vq.revival={self.revival} cannot work here: {reason}; leave revival at "
                    "random, or change that"
                )

    def _check_code_space(self) -> None:
        """Code space is exact only where every token of a code has the same expert input."""
        if self.code_input == "learned" and self.expert_input != "code":
            raise ValueError(
                f"vq.code_input=learned with vq.expert_input={self.expert_input}: learned vectors "
                "stand in the place of codes; use expert_input=code, or code_input=codebook"
            )
        if self.path == "continuous" and (
            self.execution == "code_space" or self.code_input == "learned"
        ):
            raise ValueError(
                f"vq.path=continuous has no codes for vq.execution={self.execution}, vq.code_input="
                f"{self.code_input}; use path=dual or discrete, or leave both at their defaults"
            )
        if self.expert_input != "code" and self.straight_through != "token":
            raise ValueError(
                f"vq.straight_through={self.straight_through} is for vq.expert_input=code; with "
                f"{self.expert_input} the token is part of the expert input and gets its own "
                "gradient; leave straight_through at token"
            )
        if self.execution == "code_space" and self.expert_input != "code":
            raise ValueError(
                "vq.execution=code_space cannot work here: with vq.expert_input="
                f"{self.expert_input} every token has its own expert input, so one row per code "
                "cannot stand for it (code space is exact only for expert_input=code); use "
                "vq.execution=tokens or auto"
            )
        if self.overlap_table and self.table_per_step:
            raise ValueError(
                "vq.overlap_table builds each microbatch's table during attention, and "
                "vq.table_per_step keeps one for all; set one to false"
            )
        has_table = self.in_code_space or self.has_fill_table
        if (self.table_per_step or self.overlap_table) and not has_table:
            name = "table_per_step" if self.table_per_step else "overlap_table"
            raise ValueError(
                f"vq.{name}=true is about the table of code space, but this layer has none: "
                f"vq.path={self.path}, vq.execution={self.execution}, "
                f"vq.expert_input={self.expert_input}; code space needs a discrete path with "
                "expert_input=code and execution=auto or code_space, or path=filled with fill"
            )

    def has_router(self, num_experts: int) -> bool:
        """Whether tokens choose experts by a learned router.

        Not in path=discrete; nor is there anything to choose of one expert, where the softmax over
        one logit is 1 and every balance loss constant: then the continuous path is a dense MLP.
        """
        return self.path != "discrete" and num_experts > 1

    @property
    def in_code_space(self) -> bool:
        """Whether the discrete path is evaluated once per code instead of once per token."""
        return self.has_discrete_path and self.execution != "tokens" and self.expert_input == "code"

    @property
    def has_discrete_path(self) -> bool:
        """Whether experts serve tokens by their code."""
        return self.path in ("dual", "discrete")

    @property
    def has_codes(self) -> bool:
        """Whether the layer has a codebook."""
        return self.path != "continuous"

    @property
    def has_implicit_codes(self) -> bool:
        """Whether code vectors follow from the codes' numbers (fsq, lfq)."""
        return self.quantizer in IMPLICIT

    @property
    def num_slices_side_by_side(self) -> int:
        """Parts that codes cut the hidden vector into; codes that are added (residual) do not."""
        return 1 if self.quantizer in SUMMED else self.num_code_slices

    @property
    def trains_codes(self) -> bool:
        """Whether an optimizer moves the code vectors."""
        return self.codebook_update in ("gradient", "reanchor") and not self.freeze_codebook

    @property
    def trains_codebook(self) -> bool:
        """Whether it moves anything of the codebook, all of which stays fp32."""
        return self.trains_codes or self.trains_scale or self.trains_projection

    @property
    def trains_scale(self) -> bool:
        """Whether it moves the codes' length. In a frozen codebook that stays as it is loaded."""
        return self.learn_code_scale and not self.freeze_codebook

    @property
    def trains_projection(self) -> bool:
        """Whether it turns the projection. Implicit codes are always frozen, and say nothing of
        it."""
        return self.train_projection and (self.has_implicit_codes or not self.freeze_codebook)

    @property
    def has_fill_table(self) -> bool:
        """Whether experts that a token does not visit answer by its code."""
        return self.path == "filled" and self.num_fill_experts != 0

    @property
    def builds_table_alone(self) -> bool:
        """Whether the table's experts run by themselves and not beside travelling rows."""
        is_detached = self.path == "filled" and self.fill_values == "detached"
        return self.path == "discrete" or self.table_per_step or self.overlap_table or is_detached

    @property
    def execution_in_words(self) -> str:
        """How the discrete path is evaluated, and why; one line for the user."""
        if self.path == "continuous":
            return "no discrete path (vq.path=continuous)"
        if self.path == "filled":
            return fill_in_words(self)
        rows = self.num_code_slices * self.num_codes
        if self.in_code_space:
            per = "step" if self.table_per_step else "microbatch"
            return f"discrete path in code space: {rows} rows, one table per {per}"
        reason = (
            "vq.execution=tokens"
            if self.execution == "tokens"
            else f"vq.expert_input={self.expert_input} gives every token its own expert input"
        )
        return f"discrete path by token dispatch ({reason})"

    def check_model(self, hidden_size: int, num_experts: int) -> None:
        """Raise ``ValueError`` for a combination that needs the model's sizes to be judged."""
        if hidden_size % self.num_slices_side_by_side:
            raise ValueError(
                f"hidden_size % vq.num_code_slices != 0: {hidden_size} % {self.num_code_slices} = "
                f"{hidden_size % self.num_code_slices}; product codes cut the hidden vector in "
                "equal slices"
            )
        if self.code_dim is not None and self.code_dim > hidden_size:
            raise ValueError(
                f"vq.code_dim <= hidden_size fails: {self.code_dim} > {hidden_size}; "
                f"{self.quantizer} codes lie in a subspace of the hidden vectors"
            )
        check_fill_model(self, num_experts)
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
