"""Fill: experts that a token does not visit answer by its code, from a table of N * K rows.

T tokens, N experts, n local experts, K codes, P expert-parallel ranks, H hidden size.

    Y[j, k] = E_j(v_k)                          evaluated by the rank that owns expert j
    fill[t] = sum over j of weights[t, j] * Y[j, code of t]

Every rank has the n * K rows of its own experts. As in code space no token travels, no count is
exchanged, no shape follows the data: partial outputs are summed over the expert-tensor ranks and
gathered over the expert-parallel ones, backwards the rows' gradients return in fp32. The code is a
hard choice: tokens learn through the weights, not through the code.

``vq.fill_values``: ``experts`` as above, along with the rows that travel in one grouped GEMM;
``detached`` the same values without a gradient, evaluated by themselves; ``direct`` rows that are
learned in their place (:class:`FillRows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.code_assigner import CodeAssigner
from vqmoe_megatron.moe.dispatch import ResidentRows
from vqmoe_megatron.moe.executions.execution import Answer
from vqmoe_megatron.moe.executions.table_space import Table, TableSpace
from vqmoe_megatron.moe.expert_engine import ExpertEngine, Result, Work
from vqmoe_megatron.moe.part import DensePart
from vqmoe_megatron.moe.table_exchange import gather_table, sum_over_shards
from vqmoe_megatron.vq.fill import fill_from_table


@dataclass(frozen=True)
class Fill:
    """What tokens read."""

    codes: torch.Tensor  # int64 [T]
    weights: torch.Tensor  # fp32 (fp64) [T, N], zero where an expert does not answer


class FillRows(torch.nn.Module):
    """The learned rows of this rank's experts ``[n, K, H]``, zero at the start.

    Cut over the expert-parallel ranks as experts are; expert-tensor ranks hold replicas.
    """

    def __init__(
        self, config: TransformerConfig, vq: VQConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.ep_group = pg_collection.ep
        self.expt_tp_group = pg_collection.expt_tp
        self.expt_dp_group = pg_collection.expt_dp
        shape = (
            config.num_moe_experts // self.ep_group.size(),
            vq.num_codes,
            config.hidden_size,
        )
        device = torch.cuda.current_device()
        self.values = torch.nn.Parameter(
            torch.zeros(shape, dtype=config.params_dtype, device=device)
        )
        self.values.allreduce = False  # reduced with the experts'
        # Counted once in the gradient norm, as an output bias of the experts.
        set_tensor_model_parallel_attributes(self.values, self.expt_tp_group.size() == 1, 1, 1)

    def forward(self) -> torch.Tensor:
        """``[n * K, H]``: this shard's part of the rows. Their sum over the expert-tensor ranks are
        the rows, and every one of those ranks gets the gradient of all their tokens, so that
        replicas stay equal. Called as a module, so that an overlapped gather has finished."""
        rows = self.values.flatten(0, 1)
        return rows if self.expt_tp_group.rank() == 0 else rows - rows.detach()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """One global tensor ``[N, K, H]`` behind the layer axis. No communication."""
        num_prepended = len(sharded_offsets)
        name = f"{prefix}values"
        experts = (num_prepended, self.ep_group.rank(), self.ep_group.size())
        return {
            name: ShardedTensor.from_rank_offsets(
                name,
                self.values,
                *sharded_offsets,
                experts,
                replica_id=(0, self.expt_tp_group.rank(), self.expt_dp_group.rank()),
                prepend_axis_num=num_prepended,
            )
        }


class FillSpace(TableSpace):
    """One layer's table of fill. Owns no parameters; ``rows`` are those of fill_values=direct."""

    def __init__(
        self, vq: VQConfig, assigner: CodeAssigner, engine: ExpertEngine, rows: FillRows | None
    ) -> None:
        self.vq = vq
        self.assigner = assigner
        self.engine = engine
        self.rows = rows

    @property
    def is_training(self) -> bool:
        """As the codebook's owner."""
        return self.assigner.training

    def weights(self) -> list[torch.Tensor]:
        """The learned rows, or the experts and the codes."""
        if self.rows is not None:
            return [self.rows.values]
        return [*self.engine.experts.parameters(), self.assigner.codebook.codes]

    def ask(self, x: torch.Tensor, fill: Fill) -> tuple[Work, Answer]:
        """This rank's rows as residents where they have a gradient, else the table at once."""
        if self.vq.fill_values != "experts":
            table = self.evaluate(x.dtype)
            return Work(), lambda _: self.read(table, fill, x.dtype)

        def answer(result: Result) -> DensePart:
            return self.read(self._table(result.residents[0]), fill, x.dtype)

        return self._work(x.dtype), answer

    def evaluate(self, dtype: torch.dtype) -> Table:
        """Build the table by itself.

        Communicates over the expert-tensor group (one all-reduce) and the expert-parallel group
        (one all-gather), in the backward pass one all-reduce and one reduce-scatter; ``detached``
        has no backward pass.
        """
        if self.rows is not None:
            return self._table(self.rows())
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vq.fill_values == "experts"):
            (result,) = self.engine.run([self._work(dtype)])
            return self._table(result.residents[0])

    def _work(self, dtype: torch.dtype) -> Work:
        codebook, num_codes = self.assigner.codebook, self.vq.num_codes
        vectors = codebook.lift(codebook.code_vectors().detach()[0]).to(dtype)  # [K, H]
        num_local = self.engine.num_experts // self.engine.groups[0].size()
        counts = torch.full((num_local,), num_codes, dtype=torch.int64, device=vectors.device)
        rows = vectors.repeat(num_local, 1)
        return Work(residents=(ResidentRows(rows, counts, num_codes),))

    def _table(self, outputs: torch.Tensor) -> Table:
        """From this rank's ``[n * K, H]``."""
        ep_group, expt_tp_group = self.engine.groups
        return Table(gather_table(sum_over_shards(outputs, expt_tp_group), ep_group))

    def read(self, table: Table, fill: Fill, dtype: torch.dtype) -> DensePart:
        """``[T, H]``, still in the table's fp32 (fp64): the exact part is added before ``dtype``.
        No communication."""
        values = table.values.unflatten(0, (self.engine.num_experts, -1))
        return DensePart(fill_from_table(values, fill.weights, fill.codes))
