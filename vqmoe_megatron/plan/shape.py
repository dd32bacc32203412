"""One VQMoE layer on one rank, as the cost formulas see it.

T local tokens of a microbatch, P expert-parallel ranks, E expert-tensor ranks, H hidden size, F
expert hidden size, b bytes per element, k selected experts of the continuous path, C codes per
token, K codes per slice, D = H / C columns of a code (``code_dim`` for vq.quantizer=low_dim), N
experts, S code rows of the rank that owns most of them.

    rows of a token       k continuous (none in path=discrete) + C discrete (none in =continuous)
    rows of the codebook  C K, row c K + code belongs to expert (c K + code) mod N, or every expert
                          owns C K / N of them (code maps balanced and clustered)

In code space every expert-parallel rank has S slots, so the table of code outputs is [P S, H].
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout

CHOICES = {
    "path": ("dual", "discrete", "continuous"),
    "execution": ("tokens", "code_space"),
    "straight_through": ("token", "group", "identity", "none"),
    "expert_input": ("code", "blend", "blend_convex", "token"),
    "code_input": ("codebook", "learned"),
    "code_map": ("mod", "balanced", "clustered"),
    "norm": ("none", "separate", "shared"),
    "combine": ("softmax", "sigmoid"),
    "normalization": ("LayerNorm", "RMSNorm"),
}


@dataclass(frozen=True)
class LayerShape:
    """The sizes and settings that decide what a layer costs; names are the recipe's.

    Raises:
        ValueError: for sizes that do not divide, and for a table of code outputs where every token
            has its own expert input.
    """

    num_local_tokens: int  # T, of one microbatch; a sequence-parallel rank's shard
    hidden_size: int  # H
    moe_ffn_hidden_size: int  # F
    num_moe_experts: int  # N
    moe_router_topk: int = 1
    num_codes: int = 64  # K
    num_code_slices: int = 1  # C
    code_dim: int | None = None  # D of low_dim, whose codes lie in a projection of the tokens
    gated_linear_unit: bool = False
    add_bias_linear: bool = True
    normalization: str = "LayerNorm"
    bytes_per_element: int = 4  # b
    expert_model_parallel_size: int = 1  # P
    expert_tensor_parallel_size: int = 1  # E
    tensor_model_parallel_size: int = 1
    num_microbatches: int = 1  # of an optimizer step
    path: str = "dual"
    execution: str = "tokens"
    straight_through: str = "token"
    expert_input: str = "code"
    code_input: str = "codebook"
    code_map: str = "mod"
    norm: str = "separate"
    combine: str = "softmax"
    table_per_step: bool = False  # code space: one table serves all microbatches of a step

    def __post_init__(self) -> None:
        for name, legal in CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(legal)}"
                )
        for name, value in vars(self).items():
            smallest = 0 if name == "num_local_tokens" else 1
            if type(value) is int and value < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}")
        for name, value, divisor in (
            ("num_moe_experts", self.num_moe_experts, "expert_model_parallel_size"),
            ("moe_ffn_hidden_size", self.moe_ffn_hidden_size, "expert_tensor_parallel_size"),
            ("hidden_size", self.hidden_size, "num_code_slices"),
        ):
            if value % getattr(self, divisor):
                raise ValueError(
                    f"{name} % {divisor} != 0: {value} % {getattr(self, divisor)} = "
                    f"{value % getattr(self, divisor)}"
                )
        if self.code_map != "mod" and self.num_code_rows % self.num_moe_experts:
            raise ValueError(
                f"code_map={self.code_map} needs num_code_slices * num_codes % num_moe_experts == "
                f"0: {self.num_code_rows} % {self.num_moe_experts} = "
                f"{self.num_code_rows % self.num_moe_experts}"
            )
        if self.expert_input != "code" and self.code_input == "learned":
            raise ValueError("code_input=learned needs expert_input=code")
        self._check_code_dim()
        if self.execution == "code_space":
            self._check_code_space()
        elif self.table_per_step:
            raise ValueError("table_per_step needs execution=code_space: tokens build no table")

    def _check_code_dim(self) -> None:
        if self.code_dim is None:
            return
        if self.num_code_slices > 1:
            raise ValueError(
                f"code_dim={self.code_dim} with num_code_slices={self.num_code_slices}: low_dim "
                "gives one code per token"
            )
        if self.code_dim > self.hidden_size:
            raise ValueError(f"code_dim <= hidden_size fails: {self.code_dim} > {self.hidden_size}")

    def _check_code_space(self) -> None:
        if self.path == "continuous":
            raise ValueError("execution=code_space needs a discrete path, not path=continuous")
        if self.expert_input != "code":
            raise ValueError(
                f"execution=code_space needs expert_input=code: with {self.expert_input} every "
                "token has its own expert input, which one row per code cannot stand for"
            )

    @classmethod
    def from_config(cls, config: RunConfig, layout: ParallelLayout) -> LayerShape:
        """Return the layer of a recipe on the ranks of ``layout``; execution ``auto`` is resolved
        as the layer does."""
        model, vq, train = config.model, config.vq, config.train
        num_tokens = train.micro_batch_size * model.seq_length
        shards = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
        return cls(
            num_local_tokens=num_tokens // (shards * layout.context_parallel_size),
            hidden_size=model.hidden_size,
            moe_ffn_hidden_size=model.moe_ffn_hidden_size,
            num_moe_experts=model.num_moe_experts,
            moe_router_topk=model.moe_router_topk,
            num_codes=vq.num_codes,
            num_code_slices=vq.num_code_slices,
            code_dim=vq.code_dim,
            gated_linear_unit=model.gated_linear_unit,
            add_bias_linear=model.add_bias_linear,
            normalization=model.normalization,
            bytes_per_element=2 if model.bf16 else 4,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            num_microbatches=layout.num_microbatches(
                train.global_batch_size, train.micro_batch_size
            ),
            path=vq.path,
            execution="code_space" if vq.in_code_space else "tokens",
            straight_through=vq.straight_through,
            expert_input=vq.expert_input,
            code_input=vq.code_input,
            code_map=vq.code_map,
            norm=vq.norm,
            combine=vq.combine,
            table_per_step=vq.table_per_step,
        )

    @property
    def num_continuous_rows(self) -> int:
        """T k, or 0 in the discrete path."""
        return 0 if self.path == "discrete" else self.num_local_tokens * self.moe_router_topk

    @property
    def num_discrete_rows(self) -> int:
        """T C, or 0 in the continuous path."""
        return 0 if self.path == "continuous" else self.num_local_tokens * self.num_code_slices

    @property
    def num_rows_per_token(self) -> int:
        """k + C, or one of them in a single path."""
        rows = 0 if self.path == "discrete" else self.moe_router_topk
        return rows + (0 if self.path == "continuous" else self.num_code_slices)

    @property
    def num_dispatched_rows(self) -> int:
        """Rows of this rank that travel in the forward pass; in code space the continuous ones."""
        rows = self.num_continuous_rows
        return rows if self.execution == "code_space" else rows + self.num_discrete_rows

    @property
    def has_code_inputs(self) -> bool:
        """Whether experts are fed codes, so that tokens get a gradient only by straight_through."""
        return self.path != "continuous" and self.expert_input == "code"

    @property
    def num_code_rows(self) -> int:
        """C K, distinct expert inputs of the discrete path."""
        return self.num_code_slices * self.num_codes

    @property
    def num_experts_per_rank(self) -> int:
        """N / P."""
        return self.num_moe_experts // self.expert_model_parallel_size

    def num_code_rows_of(self, rank: int) -> int:
        """Code rows of an expert-parallel rank: an equal share, or under the mod map, which deals
        rows out to the experts in turn, what its N / P experts get."""
        if self.code_map != "mod":
            return self.num_code_rows // self.expert_model_parallel_size
        rounds, left_over = divmod(self.num_code_rows, self.num_moe_experts)
        per_rank = self.num_experts_per_rank
        return rounds * per_rank + min(max(left_over - rank * per_rank, 0), per_rank)

    @property
    def num_slots(self) -> int:
        """S, code rows of the rank that owns most: rank 0, whose experts come first."""
        return self.num_code_rows_of(0)

    @property
    def num_gradient_rows_to_tokens(self) -> int:
        """Rows whose input gradients a rank forms in code space for straight_through: the T C of
        its equal share (token), or one per slot from every rank (group)."""
        return {
            "token": self.num_discrete_rows,
            "group": self.expert_model_parallel_size * self.num_slots,
        }.get(self.straight_through, 0)

    @property
    def num_gate_outputs(self) -> int:
        """Logits of the combine gate, which only the dual path has: 2 for softmax, 1 for
        sigmoid."""
        return 0 if self.path != "dual" else 2 if self.combine == "softmax" else 1

    @property
    def fc1_width(self) -> int:
        """c1 F: twice the expert width for gated experts."""
        return (2 if self.gated_linear_unit else 1) * self.moe_ffn_hidden_size

    @property
    def code_width(self) -> int:
        """D, columns of a code vector."""
        return self.code_dim or self.hidden_size // self.num_code_slices

    @property
    def straight_through_width(self) -> int:
        """Columns of an expert input's gradient that go back to its token in code space: those of
        the code, or all H for a learned input."""
        return self.hidden_size if self.code_input == "learned" else self.code_width

    @property
    def straight_through_bytes_per_element(self) -> int:
        """Of those columns: b, but the projection's fp32 (fp64) where the owner of a low_dim code
        has brought the gradient into the code's space."""
        if self.code_dim is None or self.code_input == "learned":
            return self.bytes_per_element
        return self.sum_bytes_per_element

    @property
    def sum_bytes_per_element(self) -> int:
        """Gradients summed per code are fp32, or fp64 for an fp64 layer."""
        return max(4, self.bytes_per_element)

    @property
    def code_rows_need_gradient(self) -> bool:
        """Whether the one row per code has something trained in front of its expert.

        Codes get no gradient from experts; a learned input and the input norm do. In the dual path
        one grouped GEMM serves all rows and returns the input gradients of all, unless the table
        is built once per step, by itself.
        """
        is_alone = self.path != "dual" or self.table_per_step
        return not is_alone or self.code_input == "learned" or self.norm != "none"

    @property
    def dispatched_rows_need_gradient(self) -> bool:
        """Whether token rows have an input gradient, which travels back from the experts."""
        return (
            self.path != "discrete"
            or not self.has_code_inputs
            or self.straight_through in ("token", "group")
            or self.code_rows_need_gradient
        )
