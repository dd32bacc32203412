"""The filled path: a router chooses pairs of token and expert; the other experts answer by code.

S sequence length, B batch, T = S * B local tokens, N experts, H hidden size, R chosen pairs.

    y[t] = sum over chosen e of p[t, e] E_e(x_t)
         + sum over the other experts j among the n most likely of p[t, j] E_j(v_k(t))

p is the router's softmax over all N experts, k(t) the token's nearest code, n
``vq.num_fill_experts``. Chosen are the ``moe_router_topk`` most likely, R = T k, or by
``vq.threshold_routing`` any number per token (``routing_threshold``). R then follows the data and
comes to the host, the one synchronisation of this path besides that of the dispatch.

A token learns through p, through its exact experts, and through the commitment loss; the code is a
hard choice, and no gradient goes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.code_assigner import Assignment, CodeAssigner
from vqmoe_megatron.moe.executions.execution import Execution
from vqmoe_megatron.moe.executions.fill_space import Fill
from vqmoe_megatron.moe.expert_engine import ExpertEngine, Result, TravellingRows, Work
from vqmoe_megatron.moe.megatron_settings import refuse_trained_codes_in_half
from vqmoe_megatron.moe.part import DensePart, sum_slots
from vqmoe_megatron.moe.paths import Path, Request
from vqmoe_megatron.moe.routing_threshold import RoutingThreshold
from vqmoe_megatron.vq.segment_sum import lookup_rows, sum_rows


@dataclass(frozen=True)
class _Exact:
    """The chosen pairs on their way to the experts."""

    travelling: TravellingRows
    answer: Callable[[torch.Tensor], torch.Tensor]  # their outputs -> [T, H]


class FilledPath(Path):
    """Over modules that the layer owns. ``fill`` is None for num_fill_experts=0, ``threshold``
    without threshold routing."""

    def __init__(
        self,
        vq: VQConfig,
        topk: int,
        router: torch.nn.Module,
        engine: ExpertEngine,
        assigner: CodeAssigner,
        fill: Execution | None,
        threshold: RoutingThreshold | None,
    ) -> None:
        self.vq = vq
        self.topk = topk
        self.router = router
        self.engine = engine
        self.assigner = assigner
        self.fill = fill
        self.threshold = threshold

    def ask(self, hidden_states: torch.Tensor, x: torch.Tensor) -> Request:
        """Communicates as the router's balance losses and the fill, and once to initialise the
        codebook."""
        had_codes = not self.assigner.codebook.needs_data_init
        assignment = self.assigner(x)
        if not had_codes and self.fill is not None:
            self.fill.clear()  # of the codes before data came
        distances = None if self.threshold is None else self._distances(assignment)
        probs, chosen = self.router(
            hidden_states, choose=lambda probs: self._choose(probs, distances)
        )
        statistics = ()
        if self.threshold is not None and self.assigner.training and torch.is_grad_enabled():
            statistics = self.threshold.count(probs.detach() * distances, chosen)

        exact = self._top if self.threshold is None else self._pairs
        exact = exact(x, probs, chosen)
        work, fill_answer = Work(), None
        if self.fill is not None:
            fill = Fill(assignment.codes[:, 0], self._fill_weights(probs, chosen))
            work, fill_answer = self.fill.ask(x, fill)

        def answer(result: Result) -> DensePart:
            y = exact.answer(result.rows[0])
            if fill_answer is not None:
                y = y + fill_answer(result).value()
            return DensePart(y.to(x.dtype))

        return Request(
            Work((exact.travelling,), work.residents),
            answer,
            exact.travelling.experts,
            lambda output: self._attach(output, assignment, statistics),
        )

    @torch.no_grad()
    def _distances(self, assignment: Assignment) -> torch.Tensor:
        """|x - v| / sqrt(H) in the codebook's space: ``[T, 1]``, fp32 (fp64)."""
        tokens = assignment.prepared.detach()
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        vectors = self.assigner.codebook.lookup(assignment.codes)
        return (tokens - vectors).square().mean(dim=1, keepdim=True).sqrt()

    def _choose(self, probs: torch.Tensor, distances: torch.Tensor | None) -> torch.Tensor:
        """bool ``[T, N]``."""
        if self.threshold is None:
            return _most_likely(probs, self.topk)
        return self.threshold.choose(probs * distances, probs)

    def _fill_weights(self, probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """p of the experts that answer by code, else zero: ``[T, N]``."""
        answers = ~chosen
        if self.vq.num_fill_experts is not None:
            answers = answers & _most_likely(probs, self.vq.num_fill_experts)
        return probs * answers.to(probs.dtype)

    def _top(self, x: torch.Tensor, probs: torch.Tensor, chosen: torch.Tensor) -> _Exact:
        """k pairs of every token."""
        selected = (chosen + probs.detach()).topk(self.topk, dim=1).indices
        rows = x.unsqueeze(1).expand(-1, self.topk, -1)
        weights = probs.gather(1, selected).unsqueeze(-1)
        return _Exact(
            TravellingRows(rows, selected, torch.zeros_like(selected), num_orders=1),
            lambda outputs: sum_slots(outputs * weights),
        )

    def _pairs(self, x: torch.Tensor, probs: torch.Tensor, chosen: torch.Tensor) -> _Exact:
        """R pairs, sorted by token: any number of each token's, also none.

        One host synchronisation, of R.
        """
        num_tokens, num_experts = chosen.shape
        num_pairs = self.engine.read_num_rows(chosen.sum(), num_tokens)
        chosen_first = torch.argsort((~chosen).flatten().to(torch.uint8), stable=True)
        pairs = chosen_first[:num_pairs]  # token * N + expert
        tokens = pairs // num_experts
        experts = (pairs % num_experts).unsqueeze(1)
        rows = lookup_rows(x, tokens).unsqueeze(1)  # [R, 1, H]
        weights = probs.flatten().index_select(0, pairs).unsqueeze(1)

        def answer(outputs: torch.Tensor) -> torch.Tensor:
            return sum_rows(outputs[:, 0] * weights, tokens, num_tokens)

        travelling = TravellingRows(rows, experts, torch.zeros_like(experts), num_orders=1)
        return _Exact(travelling, answer)

    def _attach(
        self, output: torch.Tensor, assignment: Assignment, statistics: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        output = self.assigner.attach(output, assignment)
        if not statistics:
            return output
        return run_in_backward(output, lambda: self.threshold.record(*statistics))

    # What ends once per step.
    def set_layer_number(self, layer_number: int, model_layer_number: int) -> None:
        """The router's balance losses are logged under Megatron's number; codes start differently
        in every layer."""
        self.router.set_layer_number(layer_number)
        self.assigner.set_layer_number(model_layer_number)

    def enter(self, is_training: bool, was_training: bool) -> None:
        """As the fill."""
        if self.fill is not None:
            self.fill.enter(is_training, was_training)

    @property
    def keeps_table(self) -> bool:
        """``vq.table_per_step``."""
        return self.fill is not None and self.fill.keeps_table

    def finish_table(self) -> None:
        """As the fill."""
        if self.fill is not None:
            self.fill.finish_table()

    def refuse_unfinished_table(self) -> None:
        """As the fill."""
        if self.fill is not None:
            self.fill.refuse_unfinished()

    def refuse_foreign_optimizer(self, config: TransformerConfig) -> None:
        """Raise ``ValueError`` for trained codes among weights of half precision."""
        refuse_trained_codes_in_half(config, self.assigner.codebook)

    def local_parts(self) -> list[torch.Tensor]:
        """The threshold's, and the assigner's."""
        own = [] if self.threshold is None else self.threshold.local_parts()
        return [*own, *self.assigner.local_parts()]

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """How many experts tokens have exactly; code usage and losses."""
        own = {} if self.threshold is None else self.threshold.scalars_of(parts)
        return own | self.assigner.scalars_of(parts)

    def apply_parts(
        self, reduced: Iterator[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Move the threshold and the codebook."""
        own = {} if self.threshold is None else self.threshold.apply_parts(reduced)
        scalars, usage = self.assigner.apply_parts(reduced)
        return own | scalars, [usage]

    def clear_step(self) -> None:
        """Forget the table, and what was recorded."""
        if self.fill is not None:
            self.fill.clear()
        self.assigner.clear_step()
        if self.threshold is not None:
            self.threshold.clear_step()


def _most_likely(probs: torch.Tensor, k: int) -> torch.Tensor:
    """bool ``[T, N]``: the k largest of each row."""
    chosen = torch.zeros_like(probs, dtype=torch.bool)
    return chosen.scatter_(1, probs.detach().topk(k, dim=1).indices, True)
