"""The memory's path: what a token reads by its codes, beside what experts make of it.

S sequence length, B batch, T = S * B local tokens, H hidden size, A addresses per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import CodeMemoryConfig, VQConfig
from vqmoe_megatron.config.memory_codebooks import hidden_quantizer
from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.code_assigner import Assignment, CodeAssigner
from vqmoe_megatron.moe.context_cut import (
    gathered_in_order,
    gathered_shards,
    own_part,
    own_shard,
)
from vqmoe_megatron.moe.expert_engine import ExpertEngine, Work
from vqmoe_megatron.moe.megatron_settings import refuse_trained_codes_in_half
from vqmoe_megatron.moe.memory.code_stream import CodeStream
from vqmoe_megatron.moe.memory.row_exchange import fetch_rows, read_rows
from vqmoe_megatron.moe.memory.row_plan import RowPlan
from vqmoe_megatron.moe.memory.row_usage import RowUsage
from vqmoe_megatron.moe.memory.values import RowValues
from vqmoe_megatron.moe.norms import mark_sequence_parallel
from vqmoe_megatron.moe.part import DensePart
from vqmoe_megatron.moe.paths import Path, Request
from vqmoe_megatron.runtime.side_stream import SideStream
from vqmoe_megatron.vq.row_addresses import row_ids


@dataclass(frozen=True)
class LayerMemory:
    """What a layer that carries memory is built with."""

    settings: CodeMemoryConfig
    stream: CodeStream
    seed: int


class MemoryGate(torch.nn.Module):
    """sigmoid(w x + b), one weight per token, one half at the start of training."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(
            config.hidden_size, 1, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        mark_sequence_parallel(self, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens ``[T, H]`` -> ``[T, 1]``. No communication."""
        return self.linear(x).sigmoid()


class HiddenCodes:
    """Codes of this layer's hidden states: a codebook of its own, without experts behind it."""

    def __init__(
        self,
        assigner: CodeAssigner,
        usage: RowUsage,
        settings: CodeMemoryConfig,
        config: TransformerConfig,
    ) -> None:
        self.assigner, self.usage = assigner, usage
        self.settings, self.config = settings, config

    def row_ids(self, codes: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Codes ``[T]`` of this rank's tokens -> rows ``[T, A]``; communicates them over TP and
        CP. ``starts`` are of whole sequences."""
        num_sequences = starts.shape[0]
        codes = codes.view(-1, num_sequences)
        tp, cp = self.assigner.pg_collection.tp, self.assigner.pg_collection.cp
        is_cut = self.config.sequence_parallel
        codes = gathered_shards(codes, tp, is_cut)  # whole sequences: ids are cheap
        codes = gathered_in_order(codes, cp)
        rows = row_ids(codes.t(), starts, self.settings.num_rows, self.settings.max_order)
        rows = own_shard(own_part(rows.transpose(0, 1), cp, 0), tp, is_cut)
        return rows.flatten(0, 1)

    def attach(
        self, output: torch.Tensor, assignment: Assignment, rows: torch.Tensor, plan: RowPlan
    ) -> torch.Tensor:
        """``output`` with the codebook's losses; its backward pass counts the rows ``[T, A]``."""
        output = self.assigner.attach(output, assignment)
        if not (self.assigner.training and torch.is_grad_enabled()):
            return output
        return run_in_backward(output, lambda: self.usage.record(rows, plan))


def as_of_memory(scalars: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars of codes of hidden states, by other names than those of the layer's codebook."""
    return {f"hidden_{name}": value for name, value in scalars.items()}


class MemoryPath(Path):
    """A layer's code memory. The layer owns the modules, one of which the model's stream is not."""

    is_weighed = False

    def __init__(
        self,
        settings: CodeMemoryConfig,
        stream: CodeStream,
        values: RowValues,
        gate: MemoryGate | None,
        hidden: HiddenCodes | None,
        engine: ExpertEngine,
        side: SideStream,
    ) -> None:
        self.settings, self.stream, self.values = settings, stream, values
        self.gate, self.hidden, self.engine, self.side = gate, hidden, engine, side
        self._ahead: tuple[RowPlan, torch.Tensor] | None = None

    def start(self) -> None:
        """Let the rows of the next pass travel now, on a second stream.

        Communicates as :func:`fetch_rows`. Does nothing where rows follow hidden states.
        """
        tokens = self.stream.microbatches.current
        if tokens is None or tokens.plan is None:
            return
        with self.side.fork():
            self._ahead = tokens.plan, self._fetch(tokens.plan)

    def own_rows(self) -> torch.Tensor:
        """What this rank's rows hold, ``[S, H]`` by slot; no communication."""
        own = self.values()
        if self.settings.values == "experts":
            num_experts, block = self.values.places.local_shape
            counts = torch.full((num_experts,), block, dtype=torch.int64, device=own.device)
            own = self.engine.evaluate(own, counts, block)
        return own

    def _fetch(self, plan: RowPlan) -> torch.Tensor:
        return fetch_rows(self.own_rows(), plan, self.stream.group)

    def _rows(self, plan: RowPlan) -> torch.Tensor:
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] is not plan:
            return self._fetch(plan)
        self.side.join(ahead[1])
        return ahead[1]

    def ask(self, hidden_states: torch.Tensor, x: torch.Tensor) -> Request:
        """Nothing of the experts; communicates as :func:`fetch_rows`, and for codes of hidden
        states as :func:`plan_rows` and over TP and CP.

        Raises:
            ValueError: where no microbatch was begun: the model's stream is not attached.
        """
        tokens = self.stream.microbatches.current
        if tokens is None:
            raise ValueError(
                "a layer with code memory was evaluated, but nobody told the model's stream of "
                "codes which tokens these are; attach the stream that the layer was built with: "
                "vqmoe_megatron.moe.attach_code_stream(model, stream), as vqmoe pretrain does"
            )
        no_experts = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
        if self.hidden is None:
            return Request(Work(), lambda _: self._part(x, tokens.plan), no_experts)
        assignment = self.hidden.assigner(x)
        rows = self.hidden.row_ids(assignment.codes[:, 0], tokens.starts)
        plan = self.stream.plan(rows)
        return Request(
            Work(),
            lambda _: self._part(x, plan),
            no_experts,
            lambda output: self.hidden.attach(output, assignment, rows, plan),
        )

    def _part(self, x: torch.Tensor, plan: RowPlan) -> DensePart:
        y = read_rows(self._rows(plan), plan, x.dtype)
        return DensePart(y if self.gate is None else (y * self.gate(x)).to(x.dtype))

    def set_layer_number(self, layer_number: int, model_layer_number: int) -> None:
        """Learned inputs and codebooks start differently in every layer."""
        self.values.set_layer_number(model_layer_number)
        if self.hidden is not None:
            self.hidden.assigner.set_layer_number(model_layer_number)

    def refuse_foreign_optimizer(self, config: TransformerConfig) -> None:
        """Raise ``ValueError`` for trained codes among weights of half precision."""
        if self.hidden is not None:
            refuse_trained_codes_in_half(config, self.hidden.assigner.codebook)

    def local_parts(self) -> list[torch.Tensor]:
        """The assigner's and the reads, for codes of hidden states."""
        if self.hidden is None:
            return []
        return [*self.hidden.assigner.local_parts(), *self.hidden.usage.local_parts()]

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """As of a codebook, under names of the memory's, and of the rows read."""
        if self.hidden is None:
            return {}
        of_codes = as_of_memory(self.hidden.assigner.scalars_of(parts))
        return of_codes | self.hidden.usage.scalars_of(parts)

    def apply_parts(
        self, reduced: Iterator[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Move the codebook."""
        if self.hidden is None:
            return {}, []
        scalars, usage = self.hidden.assigner.apply_parts(reduced)
        return as_of_memory(scalars) | self.hidden.usage.apply_parts(reduced), [usage]

    def row_reads(self) -> torch.Tensor | None:
        """Of this layer, for codes of hidden states; else the model's stream counts them."""
        return None if self.hidden is None else self.hidden.usage.by_address()

    def clear_step(self) -> None:
        """Forget rows that nobody read, and what was recorded."""
        self._ahead = None
        if self.hidden is not None:
            self.hidden.assigner.clear_step()
            self.hidden.usage.clear_step()


def build_memory_path(
    layer: torch.nn.Module,
    memory: LayerMemory,
    config: TransformerConfig,
    vq: VQConfig,
    pg_collection: ProcessGroupCollection,
    engine: ExpertEngine,
    side: SideStream,
) -> MemoryPath:
    """Give ``layer`` the modules ``code_memory``, ``memory_gate``, ``memory_assigner`` and
    ``row_usage``; return its path. No communication."""
    settings = memory.settings
    is_input = settings.values == "experts"
    layer.code_memory = RowValues(
        config, memory.stream.places, pg_collection, is_input, memory.seed
    )
    gate = None
    if settings.gate == "token":
        gate = layer.memory_gate = MemoryGate(config)
    hidden = None
    if settings.codes == "hidden":
        quantizer = hidden_quantizer(vq, settings)
        layer.memory_assigner = CodeAssigner(config, quantizer, pg_collection, memory.seed + 1)
        device = torch.cuda.current_device()
        layer.row_usage = RowUsage(settings.num_addresses, settings.num_rows, device)
        hidden = HiddenCodes(layer.memory_assigner, layer.row_usage, settings, config)
    return MemoryPath(settings, memory.stream, layer.code_memory, gate, hidden, engine, side)
