"""The VQMoE layer: y = p_c * y_continuous + p_d * y_discrete, both over the same experts.

With ``vq.path=filled`` there is one path (``filled_path``) and nothing to combine.

S sequence length, B batch, T = S * B local tokens, H hidden size, k selected experts of the
continuous path, C codes of the discrete path, R = T (k + C) rows, N experts.

1. Every path (``paths``) asks for work. Continuous: Megatron's TopKRouter selects k experts and
   their weights; one expert needs no router. Discrete: the codebook assigns C codes, code ->
   expert; its execution (``executions``) sends C rows per token along, or evaluates code rows that
   never travel.
2. One expert engine (``expert_engine``) serves all of them: one permutation plan, one all-to-all
   each way and one grouped GEMM; under expert tensor parallelism also one gather and one
   reduce-scatter. Where nothing travels, nothing of it happens.
3. Every path makes its part of the answers: continuous rows summed with the router's weights,
   discrete rows with weight 1 / sqrt(C).
4. Where Megatron's ``moe_shared_expert_intermediate_size`` asks for it, its shared expert, a dense
   MLP over the tensor-parallel ranks, makes one more part for every token.
5. The combine gate weighs the parts, but for those of paths that it does not see, which are added
   as they are; VQ losses and statistics ride on the sum.

The method is that of arXiv 2411.19402, sections 3.1-3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.captured_path import CapturedPath
from vqmoe_megatron.moe.code_assigner import CodeAssigner
from vqmoe_megatron.moe.code_inputs import CodebookInputs, LearnedCodeInputs
from vqmoe_megatron.moe.combine_gate import CombineGate, OnePath, Weights, weighted_sum
from vqmoe_megatron.moe.discrete_parts import DiscreteParts
from vqmoe_megatron.moe.executions.code_space import CodeSpace
from vqmoe_megatron.moe.executions.execution import Execution
from vqmoe_megatron.moe.executions.fill_space import FillRows, FillSpace
from vqmoe_megatron.moe.executions.step_table import StepTable
from vqmoe_megatron.moe.executions.table_ahead import TableAhead
from vqmoe_megatron.moe.executions.tokens import Tokens
from vqmoe_megatron.moe.expert_engine import EngineType, ExpertEngine
from vqmoe_megatron.moe.filled_path import FilledPath
from vqmoe_megatron.moe.foreign_loop import follow
from vqmoe_megatron.moe.layer_step import LayerStep
from vqmoe_megatron.moe.megatron_settings import check_layer_number, check_layer_settings
from vqmoe_megatron.moe.memory.path import LayerMemory, MemoryPath, build_memory_path
from vqmoe_megatron.moe.norms import NoNorm, ParallelNorm
from vqmoe_megatron.moe.part import Part
from vqmoe_megatron.moe.paths import (
    ContinuousPath,
    DiscretePath,
    OneExpertPath,
    Path,
    SharedExpertPath,
)
from vqmoe_megatron.moe.routers.step_router import StepRouter
from vqmoe_megatron.moe.routers.topk import BalancedRouter
from vqmoe_megatron.moe.routing_threshold import RoutingThreshold
from vqmoe_megatron.runtime.cpu_compat.missing_names import name_missing_functions
from vqmoe_megatron.runtime.graphs import Graph
from vqmoe_megatron.runtime.side_stream import side_stream
from vqmoe_megatron.vq.segment_sum import count_ids


class VQMoELayer(LayerStep, MoELayer):
    """A Megatron MoE layer with a discrete path beside the learned router.

    Args:
        config: Megatron's, as it passes it; so with the next three.
        submodules: router and experts.
        layer_number: from 1.
        pg_collection: the process groups; None: Megatron's default ones.
        vq: settings; None takes the defaults with K = 4 N.
        seed: of codebook initialisation and revival, the same on all ranks.
        on_every_stage: whether every pipeline stage holds such layers, so that their metrics may be
            summed over stages for Megatron's log.
        engine: builds the expert engine; others count or simulate what this one sends.
        new_graph: captures the discrete path in code space in graphs that this builds; None: not.
        memory: the layer's code memory and the model's stream of codes; None: none.
        freeze_router: whether the router's weights stay as they were drawn.
        of_newer_megatron: what newer Megatrons pass to a MoE layer besides; theirs takes it.

    Raises:
        ValueError: for a Megatron feature this layer does not compose with; the message names it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vq: VQConfig | None = None,
        seed: int = 1234,
        on_every_stage: bool = False,
        engine: EngineType = ExpertEngine,
        new_graph: Callable[[], Graph] | None = None,
        memory: LayerMemory | None = None,
        freeze_router: bool = False,
        **of_newer_megatron: object,
    ) -> None:
        vq = vq or VQConfig(num_codes=4 * config.num_moe_experts)
        check_layer_settings(config, vq)
        name_missing_functions()
        pg_collection = pg_collection or get_default_pg_collection()
        _check_shared_experts(config, submodules)
        super().__init__(config, submodules, layer_number, pg_collection, **of_newer_megatron)
        # Newer Megatrons number the layers of multi-token prediction from 1 again.
        self.num_layers_before = config.num_layers if of_newer_megatron.get("is_mtp_layer") else 0
        self.on_every_stage = on_every_stage
        self.pg_collection = pg_collection
        self.expt_tp_group = pg_collection.expt_tp
        self.vq = vq
        self.token_dispatcher = None  # Megatron's is not used: rows of all paths travel together
        if not vq.has_router(config.num_moe_experts):
            self.router = None
        elif freeze_router:
            self.router.requires_grad_(False)
        self.lends_norm = False
        self.engine = engine(self.experts, config.num_moe_experts, pg_collection)
        self.new_graph = new_graph
        self.memory = memory
        self.paths = self.build_paths(seed)
        num_weighed = len(self.weighed_paths)
        self.gate = CombineGate(config, vq, num_weighed) if num_weighed > 1 else OnePath()
        device = torch.cuda.current_device()
        num_experts = config.num_moe_experts
        self.register_buffer(
            "step_expert_load", torch.zeros(num_experts, device=device), persistent=False
        )
        self.register_buffer("step_gate", torch.zeros(2, device=device), persistent=False)
        if layer_number is not None:
            self.set_layer_number(layer_number)

    def build_paths(self, seed: int) -> list[Path]:
        """The paths of ``vq.path``; a subclass may add further ones, whose modules it owns."""
        paths: list[Path] = []
        if self.vq.path == "filled":
            paths.append(self._filled_path(seed))
        elif self.router is not None:
            paths.append(ContinuousPath(self.router, self._select))
        elif self.vq.path != "discrete":
            paths.append(OneExpertPath(self.expt_tp_group.size()))
        if self.vq.has_discrete_path:
            paths.append(self._discrete_path(seed))
        if self.shared_experts is not None:
            paths.append(SharedExpertPath(self.shared_experts))
        if self.memory is not None:
            paths.append(
                build_memory_path(
                    self,
                    self.memory,
                    self.config,
                    self.vq,
                    self.pg_collection,
                    self.engine,
                    side_stream(),
                )
            )
        return paths

    @property
    def weighed_paths(self) -> list[Path]:
        """Those among which the combine gate divides; the others are added with weight one."""
        return [path for path in self.paths if path.is_weighed]

    @property
    def discrete_paths(self) -> list[DiscretePath]:
        """Those with a codebook."""
        return [path for path in self.paths if isinstance(path, DiscretePath)]

    def _filled_path(self, seed: int) -> FilledPath:
        config, vq = self.config, self.vq
        if not isinstance(self.router, BalancedRouter) or isinstance(self.router, StepRouter):
            raise ValueError(
                f"vq.path=filled needs the probabilities of all experts, which "
                f"{type(self.router).__name__} does not give; use model.moe_router=topk, "
                "MoESubmodules(router=BalancedRouter), or a subclass of it"
            )
        self.assigner = CodeAssigner(config, vq, self.pg_collection, seed)
        self.threshold = RoutingThreshold() if vq.threshold_routing else None
        fill = None
        if vq.has_fill_table:
            is_learned = vq.fill_values == "direct"
            self.fill_rows = FillRows(config, vq, self.pg_collection) if is_learned else None
            fill = FillSpace(vq, self.assigner, self.engine, self.fill_rows)
            fill = StepTable(fill) if vq.table_per_step else fill
        topk, parts = config.moe_router_topk, (self.assigner, fill, self.threshold)
        return FilledPath(vq, topk, self.router, self.engine, *parts)

    def _discrete_path(self, seed: int) -> DiscretePath:
        config, vq = self.config, self.vq
        self.assigner = CodeAssigner(config, vq, self.pg_collection, seed)
        codebook = self.assigner.codebook
        self.code_inputs = CodebookInputs(codebook)
        if vq.code_input == "learned":
            self.code_inputs = LearnedCodeInputs(config, vq, codebook, seed)
        norm_size = config.hidden_size, config.layernorm_epsilon
        self.input_norm = NoNorm() if vq.norm == "none" else ParallelNorm(config, *norm_size)
        output_norm = self.input_norm
        if vq.norm == "separate":
            output_norm = self.output_norm = ParallelNorm(config, *norm_size)
        parts = DiscreteParts(
            vq,
            self.assigner,
            self.code_inputs,
            self.input_norm,
            output_norm,
            self.pg_collection.tp_cp,
        )
        execution = self._execution(parts)
        if self.new_graph is not None and isinstance(execution, CodeSpace):
            return CapturedPath(self.assigner, self.code_inputs, execution, self.new_graph)
        return DiscretePath(self.assigner, self.code_inputs, execution)

    def lend_norm(self) -> torch.nn.Module:
        """The norm of expert inputs and the discrete output, for the block around the layer
        (vq.norm=shared_with_block)."""
        self.lends_norm = True
        return self.input_norm

    def _execution(self, parts: DiscreteParts) -> Execution:
        if not self.vq.in_code_space:
            return Tokens(parts)
        space = CodeSpace(parts, self.engine)
        if self.vq.overlap_table:
            return TableAhead(space, side_stream())
        return StepTable(space) if self.vq.table_per_step else space

    def start_ahead(self, tables: bool = True, rows: bool = True) -> None:
        """Start what this layer's turn needs and hidden states have no part in.

        For whoever knows that the turn comes: ``engines/megatron`` calls it before attention.
        Communicates what it starts, on a second stream.

        Args:
            tables: start those of ``vq.overlap_table``.
            rows: start those of a code memory. Neither where weights arrive in hooks
                (overlap_param_gather): the stream that asks first waits for them, the other does
                not.
        """
        for path in self.discrete_paths:
            if tables and self.training and isinstance(path.execution, TableAhead):
                path.execution.start(next(self.experts.parameters()).dtype)
        for path in self.paths:
            if rows and isinstance(path, MemoryPath) and not self.moe_layer_recompute:
                path.start()

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; decides this layer's random choices.

        Raises:
            ValueError: where Megatron's ``moe_layer_freq`` wants a dense layer.
        """
        self.layer_number = layer_number + self.num_layers_before
        check_layer_number(self.config, self.layer_number)
        for path in self.paths:
            path.set_layer_number(layer_number, self.layer_number)

    def train(self, mode: bool = True) -> VQMoELayer:
        """Switch between training and evaluation; a kept table is forgotten.

        Raises:
            ValueError: in the middle of a step with one table, whose gradient would be lost.
        """
        for path in self.paths:
            path.enter(mode, self.training)
        return super().train(mode)

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: object = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Evaluate the layer on hidden states ``[S, B, H]`` (S is the local shard under SP).

        Returns ``([S, B, H], None)``; no bias is left for the caller to add.

        Communicates over the expert-parallel and expert-tensor groups (dispatch), over ``tp_cp``
        when the balance loss is on (Megatron's router), and once over ``tp_dp_cp`` to initialise
        the codebook.

        Raises:
            ValueError: for a padding mask, torch.autocast, TP > 1 in training without sequence
                parallelism, a block that does not take the norm it should share, or a training loop
                whose steps cannot be followed (``foreign_loop``).
        """
        if padding_mask is not None or intermediate_tensors is not None:
            raise ValueError("VQMoELayer takes no padding mask and no captured CUDA graph tensors")
        if torch.is_autocast_enabled(hidden_states.device.type):
            raise ValueError(
                "VQMoELayer does not run under torch.autocast, which casts its inputs and not its "
                "experts; use Megatron's own mixed precision (bf16=True and Float16Module)"
            )
        if self.vq.norm == "shared_with_block" and not self.lends_norm:
            raise ValueError(
                "vq.norm=shared_with_block in a layer whose block has norms of its own; build it "
                "with get_vqmoe_block_spec(config, vq, norm_placement='post'), or use vq.norm="
                "shared"
            )
        if self.training and self.tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("training with TP > 1 needs sequence_parallel=True in a MoE layer")
        if self.training:
            follow(self, self.config)
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._evaluate, False, hidden_states), None
        return self._evaluate(hidden_states), None

    def _evaluate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        requests = [path.ask(hidden_states, x) for path in self.paths]
        results = self.engine.run([request.work for request in requests])
        weighed: list[Part] = []
        added: list[Part] = []
        for path, request, result in zip(self.paths, requests, results, strict=True):
            (weighed if path.is_weighed else added).append(request.answer(result))
        weights = self.gate(x)
        output = weighted_sum(weighed, weights)
        for part in added:
            output = output + part.value()
        for request in requests:
            output = request.attach(output)
        experts = torch.cat([request.experts.reshape(-1) for request in requests])
        return self._attach_load(output, experts, weights).view_as(hidden_states)

    def _select(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Router probabilities and experts of the k selected experts, ``[T, k]`` each.

        k is the router's own at this moment, where it has one. A token that a capacity rule dropped
        keeps k rows; their weight is zero.
        """
        probs, routing_map = self.route(hidden_states)
        k = getattr(self.router, "topk", self.config.moe_router_topk)
        selected = routing_map.to(torch.float32).add(probs.detach()).topk(k, dim=1).indices
        return probs.gather(1, selected), selected

    def _attach_load(
        self, output: torch.Tensor, experts: torch.Tensor, weights: Weights
    ) -> torch.Tensor:
        """``output`` [T, H] whose backward pass counts ``experts`` and discrete weights, once."""
        if not (self.training and torch.is_grad_enabled()):
            return output

        num_tokens = float(output.shape[0])  # the output itself must not be kept
        of_discrete = [
            weight
            for path, weight in zip(self.weighed_paths, weights, strict=True)
            if path.is_discrete
        ]

        def record() -> None:
            self.step_expert_load += count_ids(experts, self.config.num_moe_experts)
            discrete = self.step_gate.new_zeros(())
            for weight in of_discrete:
                discrete += num_tokens if weight is None else weight.detach().float().sum()
            self.step_gate += torch.stack([discrete, discrete.new_full((), num_tokens)])
            self.recorded()

        return run_in_backward(output, record)


def _check_shared_experts(config: TransformerConfig, submodules: MoESubmodules | None) -> None:
    """Raise ``ValueError`` where a shared expert is asked for and the spec has none."""
    size = config.moe_shared_expert_intermediate_size
    if size is not None and (submodules is None or submodules.shared_experts is None):
        raise ValueError(
            f"moe_shared_expert_intermediate_size={size}, but the layer's MoESubmodules have no "
            "shared_experts; build them with get_vqmoe_block_spec(config, vq), or leave it at None"
        )
