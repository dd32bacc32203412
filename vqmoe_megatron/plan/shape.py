"""One VQMoE layer on one rank, as the cost formulas see it.

T local tokens of a microbatch, P expert-parallel ranks, E expert-tensor ranks, H hidden size, F
expert hidden size, b bytes per element, k selected experts of the continuous path, C codes per
token, K codes per slice, Fs width of a shared expert, D = H / C columns of a code (``code_dim`` for
vq.quantizer=low_dim), N experts, S code rows of the rank that owns most of them.

    rows of a token       k continuous (none in path=discrete) + C discrete (only in =dual and
                          =discrete); path=filled has k, with threshold routing 1 on average
    rows of the codebook  C K, row c K + code belongs to expert (c K + code) mod N, or every expert
                          owns C K / N of them (code maps balanced and clustered)

In code space every expert-parallel rank has S slots, so the table of code outputs is [P S, H].
Fill has a row of every expert and code: S = N / P K.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config import RouterConfig, RunConfig, VQConfig
from vqmoe_megatron.plan.layout import ParallelLayout

FILL_BLOCK = 32  # least tokens of a product that reads fill (vq/fill.py)


@dataclass(frozen=True)
class LayerShape:
    """The sizes and settings that decide what a layer costs; names are the recipe's.

    Raises:
        ValueError: for sizes that do not divide, or that the settings in ``vq`` do not go with.
    """

    vq: VQConfig
    num_local_tokens: int  # T, of one microbatch; a sequence-parallel rank's shard
    hidden_size: int  # H
    moe_ffn_hidden_size: int  # F
    num_moe_experts: int  # N
    moe_router_topk: int = 1
    gated_linear_unit: bool = False
    bytes_per_element: int = 4  # b
    expert_model_parallel_size: int = 1  # P
    expert_tensor_parallel_size: int = 1  # E
    tensor_model_parallel_size: int = 1
    num_microbatches: int = 1  # of an optimizer step
    moe_shared_expert_intermediate_size: int | None = None  # Fs
    moe_router: str = "topk"
    router: RouterConfig = RouterConfig()  # with its nulls filled in

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            smallest = 0 if name == "num_local_tokens" else 1
            if type(value) is int and value < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}")
        for name, value, divisor in (
            ("num_moe_experts", self.num_moe_experts, "expert_model_parallel_size"),
            ("moe_ffn_hidden_size", self.moe_ffn_hidden_size, "expert_tensor_parallel_size"),
            (
                "moe_shared_expert_intermediate_size",
                self.shared_expert_width,
                "tensor_model_parallel_size",
            ),
        ):
            if value % getattr(self, divisor):
                raise ValueError(
                    f"{name} % {divisor} != 0: {value} % {getattr(self, divisor)} = "
                    f"{value % getattr(self, divisor)}"
                )
        self.vq.check_model(self.hidden_size, self.num_moe_experts)

    @classmethod
    def from_config(cls, config: RunConfig, layout: ParallelLayout) -> LayerShape:
        """Return the layer of a recipe on the ranks of ``layout``."""
        model, train = config.model, config.train
        num_tokens = train.micro_batch_size * model.seq_length
        shards = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
        return cls(
            vq=config.vq,
            num_local_tokens=num_tokens // (shards * layout.context_parallel_size),
            hidden_size=model.hidden_size,
            moe_ffn_hidden_size=model.moe_ffn_hidden_size,
            num_moe_experts=model.num_moe_experts,
            moe_router_topk=model.moe_router_topk,
            gated_linear_unit=model.gated_linear_unit,
            bytes_per_element=2 if model.bf16 else 4,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            num_microbatches=layout.num_microbatches(train),
            moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
            moe_router=model.moe_router,
            router=config.router.for_run(
                model.moe_router, model.num_moe_experts, train.train_iters
            ),
        )

    @property
    def has_router(self) -> bool:
        """:meth:`VQConfig.has_router`."""
        return self.vq.has_router(self.num_moe_experts)

    @property
    def holds_one_expert(self) -> bool:
        """Whether this rank has the whole of the only expert, so that its rows go nowhere."""
        return self.num_moe_experts == self.expert_tensor_parallel_size == 1

    @property
    def shared_expert_width(self) -> int:
        """Fs, or 0 without a shared expert."""
        return self.moe_shared_expert_intermediate_size or 0

    @property
    def num_continuous_rows(self) -> int:
        """T k, or 0 in the discrete path."""
        return 0 if self.vq.path == "discrete" else self.num_local_tokens * self.moe_router_topk

    @property
    def num_discrete_rows(self) -> int:
        """T C, or 0 without a discrete path."""
        return self.num_searched_rows if self.vq.has_discrete_path else 0

    @property
    def num_searched_rows(self) -> int:
        """T C whose nearest code is searched, or 0 without a codebook."""
        return self.num_local_tokens * self.vq.num_code_slices if self.vq.has_codes else 0

    @property
    def num_dispatched_rows(self) -> int:
        """Rows of this rank that experts evaluate token by token; in code space the continuous
        ones."""
        rows = self.num_continuous_rows
        return rows if self.vq.in_code_space else rows + self.num_discrete_rows

    @property
    def num_staying_rows(self) -> int:
        """Of these, rows that are neither sorted nor sent: the continuous ones of a layer whose one
        expert this rank holds whole."""
        return self.num_continuous_rows if self.holds_one_expert else 0

    @property
    def num_travelling_rows(self) -> int:
        """Of these, the rows that are sorted by expert, and sent where there are several ranks."""
        return self.num_dispatched_rows - self.num_staying_rows

    @property
    def has_code_inputs(self) -> bool:
        """Whether experts are fed codes, so that tokens get a gradient only by straight_through."""
        return self.vq.has_discrete_path and self.vq.expert_input == "code"

    @property
    def num_code_rows(self) -> int:
        """C K, distinct expert inputs of the discrete path."""
        return self.vq.num_code_slices * self.vq.num_codes

    @property
    def num_experts_per_rank(self) -> int:
        """N / P."""
        return self.num_moe_experts // self.expert_model_parallel_size

    def num_code_rows_of(self, rank: int) -> int:
        """Code rows of an expert-parallel rank: an equal share, or under the mod map, which deals
        rows out to the experts in turn, what its N / P experts get; of fill N / P K."""
        if self.vq.path == "filled":
            return self.num_experts_per_rank * self.vq.num_codes if self.vq.has_fill_table else 0
        if self.vq.code_map != "mod":
            return self.num_code_rows // self.expert_model_parallel_size
        rounds, left_over = divmod(self.num_code_rows, self.num_moe_experts)
        per_rank = self.num_experts_per_rank
        return rounds * per_rank + min(max(left_over - rank * per_rank, 0), per_rank)

    @property
    def num_slots(self) -> int:
        """S in code space and of fill, else 0: rank 0, whose experts come first, owns most code
        rows."""
        has_table = self.vq.in_code_space or self.vq.has_fill_table
        return self.num_code_rows_of(0) if has_table else 0

    @property
    def num_evaluated_slots(self) -> int:
        """S that experts run on: none of learned rows."""
        return 0 if self.vq.fill_values == "direct" else self.num_slots

    @property
    def has_table_gradient(self) -> bool:
        """Whether the table's gradient returns to the owners of its rows."""
        return self.vq.fill_values != "detached"

    @property
    def num_norms(self) -> int:
        """Around the experts of the discrete path."""
        return 2 if self.vq.has_discrete_path and self.vq.norm != "none" else 0

    @property
    def num_fill_block_rows(self) -> int:
        """Rows of the products that read fill, B (T // B + K): tokens by code, padded to blocks of
        B = max(32, N); 0 without fill."""
        if not self.vq.has_fill_table:
            return 0
        size = max(FILL_BLOCK, self.num_moe_experts)
        return size * (self.num_local_tokens // size + self.vq.num_codes)

    @property
    def num_gradient_rows_to_tokens(self) -> int:
        """Rows whose input gradients a rank forms in code space for straight_through: the T C of
        its equal share (token), or one per slot from every rank (group)."""
        if not self.vq.in_code_space:
            return 0
        return {
            "token": self.num_discrete_rows,
            "group": self.expert_model_parallel_size * self.num_slots,
        }.get(self.vq.straight_through, 0)

    @property
    def num_gate_outputs(self) -> int:
        """Logits of the combine gate, which only the dual path has: 2 for softmax, 1 for
        sigmoid."""
        return 0 if self.vq.path != "dual" else 2 if self.vq.combine == "softmax" else 1

    @property
    def fc1_width(self) -> int:
        """c1 F: twice the expert width for gated experts."""
        return (2 if self.gated_linear_unit else 1) * self.moe_ffn_hidden_size

    @property
    def code_width(self) -> int:
        """D, columns of a code vector."""
        return self.vq.code_dim or self.hidden_size // self.vq.num_slices_side_by_side

    @property
    def straight_through_width(self) -> int:
        """Columns of an expert input's gradient that go back to its token in code space: those of
        the code, or all H for a learned input."""
        return self.hidden_size if self.vq.code_input == "learned" else self.code_width

    @property
    def straight_through_bytes_per_element(self) -> int:
        """Of those columns: b, but the projection's fp32 (fp64) where the owner of a low_dim code
        has brought the gradient into the code's space."""
        if self.vq.code_dim is None or self.vq.code_input == "learned":
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
        is built by itself, or the other rows stay with their one expert.
        """
        is_alone = (
            self.vq.path == "continuous" or self.vq.builds_table_alone or self.holds_one_expert
        )
        return not is_alone or self.vq.code_input == "learned" or self.num_norms > 0

    @property
    def dispatched_rows_need_gradient(self) -> bool:
        """Whether token rows have an input gradient, which travels back from the experts."""
        return (
            self.vq.path != "discrete"
            or not self.has_code_inputs
            or self.vq.straight_through in ("token", "group")
            or self.code_rows_need_gradient
        )
