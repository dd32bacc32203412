"""The paths of the layer: what each asks the experts for, and what it makes of their answer.

S sequence length, B batch, T = S * B local tokens, H hidden size, k selected experts of the
continuous path, C codes of a discrete one, N experts.

A path is a plain object over modules that the layer owns, so that checkpoint keys do not know it.
The layer holds a list of them: a further one, for instance a second codebook, is an entry in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.moe.code_assigner import CodeAssigner
from vqmoe_megatron.moe.code_inputs import ExpertCodeInputs
from vqmoe_megatron.moe.dispatch import ResidentRows
from vqmoe_megatron.moe.executions.execution import Execution
from vqmoe_megatron.moe.expert_engine import Result, TravellingRows, Work
from vqmoe_megatron.moe.megatron_settings import refuse_trained_codes_in_half
from vqmoe_megatron.moe.part import DensePart, Part, sum_slots
from vqmoe_megatron.moe.routers.step_router import StepRouter


def _as_it_is(output: torch.Tensor) -> torch.Tensor:
    return output


@dataclass(frozen=True)
class Request:
    """What one path asks for in one forward pass."""

    work: Work
    answer: Callable[[Result], Part]
    experts: torch.Tensor  # int64 [T, k or C] that serve its tokens, for the load; may be empty
    attach: Callable[[torch.Tensor], torch.Tensor] = _as_it_is  # losses onto the output [T, H]


class Path(ABC):
    """One summand of the layer's output. What ends once per step does nothing by default."""

    is_weighed = True  # by the combine gate; else added to the weighted sum with weight one
    is_discrete = False  # whether its weight counts in the metric combine_discrete_weight

    @abstractmethod
    def ask(self, hidden_states: torch.Tensor, x: torch.Tensor) -> Request:
        """Hidden states ``[S, B, H]`` and their view ``[T, H]`` -> what the experts are asked for.

        One view for all paths: its gradients add up in one order.
        """

    def set_layer_number(self, layer_number: int, model_layer_number: int) -> None:
        """Decide this layer's random choices by its 1-based number in the whole model.

        ``layer_number`` is what Megatron calls it, which newer ones count anew for layers of
        multi-token prediction.
        """

    def enter(self, is_training: bool, was_training: bool) -> None:
        """The layer turns to training or evaluation, or is told so again."""

    @property
    def keeps_table(self) -> bool:
        """Whether something is differentiated at the end of the step."""
        return False

    def finish_table(self) -> None:
        """Differentiate it."""

    def refuse_unfinished_table(self) -> None:
        """Raise ``ValueError`` where the optimizer would step without its gradient."""

    def refuse_foreign_optimizer(self, config: TransformerConfig) -> None:
        """Raise ``ValueError`` for what Megatron's optimizers cannot hold unless told how."""

    def local_parts(self) -> list[torch.Tensor]:
        """This rank's fp32 sums of the step, in the order in which :meth:`apply_parts` reads."""
        return []

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What reduced sums say: fp32 scalars by metric name. Moves nothing."""
        return {}

    def apply_parts(
        self, reduced: Iterator[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Move by the reduced sums; return scalars, and code usage ``[C, K]`` where there are
        codes."""
        return {}, []

    def row_reads(self) -> torch.Tensor | None:
        """As :meth:`StepOwner.row_reads`."""
        return None

    def clear_step(self) -> None:
        """Forget the step."""


class ContinuousPath(Path):
    """k experts of a learned router, their outputs summed with its weights.

    ``select`` gives probabilities and experts ``[T, k]`` of hidden states.
    """

    def __init__(
        self,
        router: torch.nn.Module,
        select: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.router = router
        self.select = select

    def ask(self, hidden_states: torch.Tensor, x: torch.Tensor) -> Request:
        """Communicates as Megatron's router does, for its balance losses."""
        probs, selected = self.select(hidden_states)
        rows = x.unsqueeze(1).expand(-1, selected.shape[1], -1)

        def answer(result: Result) -> DensePart:
            return DensePart(sum_slots(result.rows[0] * probs.unsqueeze(-1)).to(x.dtype))

        travelling = TravellingRows(rows, selected, torch.zeros_like(selected), num_orders=1)
        return Request(Work(travelling=(travelling,)), answer, selected)

    def set_layer_number(self, layer_number: int, model_layer_number: int) -> None:
        """The router's balance losses are logged under Megatron's number."""
        self.router.set_layer_number(layer_number)

    @property
    def _step(self) -> StepRouter | None:
        """The router, where something of it ends once per step."""
        return self.router if isinstance(self.router, StepRouter) else None

    def local_parts(self) -> list[torch.Tensor]:
        """The router's."""
        return self._step.local_parts() if self._step else []

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The router's."""
        return self._step.scalars_of(parts) if self._step else {}

    def apply_parts(
        self, reduced: Iterator[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Move the router by its sums."""
        return (self._step.apply_parts(reduced) if self._step else {}), []

    def clear_step(self) -> None:
        """Forget what the router recorded."""
        if self._step:
            self._step.clear_step()


class OneExpertPath(Path):
    """The continuous path of a layer with one expert: a dense MLP, without a router.

    ``num_shards`` ranks hold a part of the expert each; alone, a rank evaluates its tokens where
    they are.
    """

    def __init__(self, num_shards: int) -> None:
        self.num_shards = num_shards

    def ask(self, hidden_states: torch.Tensor, x: torch.Tensor) -> Request:
        """No communication of its own; among several shards the rows travel."""
        experts = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
        if self.num_shards > 1:
            rows = TravellingRows(x.unsqueeze(1), experts, experts, num_orders=1)
            work = Work(travelling=(rows,))
            return Request(work, lambda result: DensePart(sum_slots(result.rows[0])), experts)
        num_rows = torch.full((1,), x.shape[0], dtype=torch.int64, device=x.device)
        work = Work(residents=(ResidentRows(x, num_rows, x.shape[0]),))
        return Request(work, lambda result: DensePart(result.residents[0]), experts)


class SharedExpertPath(Path):
    """Megatron's shared expert: a dense MLP beside the experts, for every token.

    ``shared_experts`` maps hidden states ``[S, B, H]`` to as many.
    """

    is_weighed = False

    def __init__(self, shared_experts: torch.nn.Module) -> None:
        self.shared_experts = shared_experts

    def ask(self, hidden_states: torch.Tensor, x: torch.Tensor) -> Request:
        """Asks the experts for nothing. Its linear layers communicate over ``tp``: under sequence
        parallelism they gather ``[S, B, H]`` and scatter the sum."""

        def answer(result: Result) -> DensePart:
            return DensePart(self.shared_experts(hidden_states).reshape(x.shape))

        return Request(Work(), answer, torch.empty(0, dtype=torch.int64, device=x.device))


class DiscretePath(Path):
    """The experts of a token's codes, evaluated as ``execution`` does."""

    is_discrete = True

    def __init__(
        self, assigner: CodeAssigner, code_inputs: ExpertCodeInputs, execution: Execution
    ) -> None:
        self.assigner = assigner
        self.code_inputs = code_inputs
        self.execution = execution

    def ask(self, hidden_states: torch.Tensor, x: torch.Tensor) -> Request:
        """Communicates as the execution, and once to initialise the codebook."""
        had_codes = not self.assigner.codebook.needs_data_init
        assignment = self.assigner(x)
        if not had_codes:
            self.execution.clear()  # of the codes before data came
        work, answer = self.execution.ask(x, assignment)
        return Request(
            work,
            answer,
            assignment.experts,
            lambda output: self.assigner.attach(output, assignment),
        )

    def set_layer_number(self, layer_number: int, model_layer_number: int) -> None:
        """Codes and learned inputs start differently in every layer."""
        self.assigner.set_layer_number(model_layer_number)
        self.code_inputs.set_layer_number(model_layer_number)

    def enter(self, is_training: bool, was_training: bool) -> None:
        """As the execution."""
        self.execution.enter(is_training, was_training)

    @property
    def keeps_table(self) -> bool:
        """``vq.table_per_step``."""
        return self.execution.keeps_table

    def finish_table(self) -> None:
        """As the execution."""
        self.execution.finish_table()

    def refuse_unfinished_table(self) -> None:
        """As the execution."""
        self.execution.refuse_unfinished()

    def refuse_foreign_optimizer(self, config: TransformerConfig) -> None:
        """Raise ``ValueError`` for trained codes among weights of half precision."""
        refuse_trained_codes_in_half(config, self.assigner.codebook)

    def local_parts(self) -> list[torch.Tensor]:
        """The assigner's."""
        return self.assigner.local_parts()

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Code usage and losses."""
        return self.assigner.scalars_of(parts)

    def apply_parts(
        self, reduced: Iterator[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Move the codebook."""
        scalars, usage = self.assigner.apply_parts(reduced)
        return scalars, [usage]

    def clear_step(self) -> None:
        """Forget the table, and what the assigner recorded."""
        self.execution.clear()
        self.assigner.clear_step()
