"""DeepSpeed as the training engine: Megatron's model, DeepSpeed's data parallelism and ZeRO.

1. The model is Megatron's, without its DDP; its experts are registered with DeepSpeed.
2. A step: DeepSpeed's backward over the microbatches, reducing gradients after the last (ZeRO 2:
   along the way); the codebooks' sums over all replicas; all ranks agree; codebooks and optimizer
   move, or nothing does.
3. Its optimizer answers as Megatron's do to what checkpoints ask.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.engines.deepspeed.gradients import Gradients, WholeGradients, ZeroGradients
from vqmoe_megatron.engines.deepspeed.package import import_deepspeed, local_rank_variable
from vqmoe_megatron.engines.deepspeed.settings import deepspeed_settings
from vqmoe_megatron.engines.engine import Engine, StepResult
from vqmoe_megatron.engines.megatron.fused_adam import fuse_adams
from vqmoe_megatron.engines.megatron.model import build_chunks, build_transformer_config
from vqmoe_megatron.engines.megatron.optimizer import build_scheduler
from vqmoe_megatron.engines.megatron.step import run_microbatches, sum_reports
from vqmoe_megatron.moe.codebook_sync import CodebookSync
from vqmoe_megatron.moe.step_owner import LayerStatistics
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.runtime.fused_parts import choose_parts
from vqmoe_megatron.runtime.world import choose_device
from vqmoe_megatron.tasks.task import Batch, Task
from vqmoe_megatron.vq.codebook import Codebook


class Replica(MegatronModule):
    """A model chunk as DeepSpeed wraps it: what stands where Megatron's DDP would.

    ``module`` is the chunk; ``expert_groups`` has no parameters.
    """

    def __init__(self, chunk: torch.nn.Module, expert_groups: torch.nn.Module) -> None:
        super().__init__(config=chunk.config)
        self.module = chunk
        self.expert_groups = expert_groups

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The chunk's."""
        return self.module(*args, **kwargs)

    def set_input_tensor(self, tensor: Any) -> None:
        """The chunk's; Megatron's schedules call it at every stage."""
        self.module.set_input_tensor(tensor)


class DeepSpeedEngine(Engine):
    """ZeRO 0, 1 and 2 at TP = PP = CP = ETP = 1, experts over any number of ranks."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        replica: Replica,
        engine: Any,
        optimizer: Any,
        num_microbatches: int,
    ) -> None:
        self.config, self.task, self.engine = config, task, engine
        self.model, self.optimizer = [replica], optimizer
        self.scheduler = build_scheduler(config, optimizer)
        self.num_microbatches = num_microbatches
        self.codebooks = [m for m in replica.modules() if isinstance(m, Codebook)]
        # Trained codes are also set from data and revived, of which ZeRO's copies know nothing.
        self.trained_codes = [b.codes for b in self.codebooks if b.codes.requires_grad]
        self.codebook_sync: CodebookSync = replica.config.finalize_model_grads_func
        self.gradients: Gradients = (
            ZeroGradients(engine)
            if config.train.zero_stage
            else WholeGradients(engine, config.optimizer.clip_grad)
        )

    @classmethod
    def build(cls, config: RunConfig, layout: ParallelLayout, task: Task) -> DeepSpeedEngine:
        """Build this rank's part. The preflight has checked the layout (``plan/engine_rules.py``).

        Communicates: DeepSpeed broadcasts parameters over their replicas and makes its groups.

        Raises:
            ValueError: when DeepSpeed is not installed, or groups experts otherwise than Megatron.
        """
        deepspeed = import_deepspeed()
        from vqmoe_megatron.engines.deepspeed.expert_groups import ExpertGroups, mark_experts
        from vqmoe_megatron.engines.deepspeed.optimizer import DeepSpeedOptimizer
        from vqmoe_megatron.engines.deepspeed.parameter_groups import parameter_groups

        ep_size = layout.expert_model_parallel_size
        parts = replace(  # DeepSpeed's buffers are not Megatron's
            choose_parts(config, choose_device(config.train.device)[0]),
            gradient_accumulation_fusion=False,
            fused_adam=False,
        )
        transformer = build_transformer_config(config, layout, parts)
        transformer.finalize_model_grads_func = CodebookSync(applies_at_once=False, finalize=None)
        (chunk,) = build_chunks(config, transformer, layout, parts=parts)
        mark_experts(chunk, ep_size)
        replica = Replica(chunk, ExpertGroups(config.model.num_moe_experts, ep_size))
        section = config.optimizer
        groups = parameter_groups(config, replica, ep_size)
        of_groups = [list(group["params"]) for group in groups]
        adam = torch.optim.AdamW(
            groups,
            lr=section.lr,
            betas=(section.adam_beta1, section.adam_beta2),
            eps=section.adam_eps,
            weight_decay=section.weight_decay,
        )
        kept = {p: p.data for p in chunk.parameters() if not p.requires_grad}
        with local_rank_variable():
            engine, *_ = deepspeed.initialize(
                model=replica,
                optimizer=adam,
                config=deepspeed_settings(config, layout),
                dist_init_required=False,
            )
        for parameter, data in kept.items():  # codes stay fp32, which DeepSpeed would cast
            parameter.data = data
        optimizer = DeepSpeedOptimizer(engine, adam, of_groups, has_main_copies=config.model.bf16)
        fuse_adams(optimizer, "cpu" if config.train.offload_optimizer else engine.device.type)
        return cls(config, task, replica, engine, optimizer, layout.num_microbatches(config.train))

    def step(
        self, iterators: list[Iterator[Batch]], stop_request: int, save_request: bool
    ) -> StepResult:
        """As the interface says.

        Communicates: DeepSpeed's reductions and gathers, the codebooks' sums, three integers over
        the world.
        """
        started = time.perf_counter()
        reports = []
        for number in range(self.num_microbatches):
            reports.append(self._forward_backward(iterators[0]))
            if number + 1 < self.num_microbatches:
                self.engine.step()  # which only counts, before the last microbatch
        self.codebook_sync(self.model)
        # The rest of Megatron's finalize_model_grads that is no reduction: global_aux_loss counts.
        reset_model_temporary_tensors(self.model[0].config, self.model)
        sums = sum_reports(reports)
        norm = self.gradients.norm().to(sums.device)
        flags = torch.stack(
            [
                1 - (torch.isfinite(sums[0]) & torch.isfinite(norm)).int(),
                torch.full((), stop_request, dtype=torch.int32, device=sums.device),
                torch.full((), save_request, dtype=torch.int32, device=sums.device),
            ]
        )
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        (bad, stop, save), (total, num_tokens) = flags.tolist(), sums.tolist()
        learning_rate = self._learning_rate()
        if bad:
            self.gradients.drop()
            self.codebook_sync.discard(self.model)
        else:
            self.codebook_sync.apply()
            self.optimizer.reload_model_params(self.trained_codes)
        self.engine.step()
        for codebook in self.codebooks:  # ZeRO writes its copies behind the hook that does so
            codebook.put_back_frozen()
        if bad and self.config.train.zero_stage and self.engine.was_step_applied():
            raise RuntimeError(
                "the loss is not finite and every gradient is: DeepSpeed has taken a step that "
                "should have been dropped; go back to the last checkpoint"
            )
        self.scheduler.step(increment=self.config.train.global_batch_size)
        return StepResult(
            loss=total / max(num_tokens, 1.0),
            grad_norm=float("nan") if bad else norm.item(),
            learning_rate=learning_rate,
            skipped=bool(bad),
            stop_request=stop,
            save_requested=bool(save),
            core_seconds=time.perf_counter() - started,
        )

    def _forward_backward(self, iterator: Iterator[Batch]) -> dict[str, Any]:
        """One microbatch, its loss weighed as Megatron's schedules weigh it; returns its report."""
        device = torch.cuda.current_device()
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device) / self.num_microbatches)
        output, loss_of = self.task.forward_step(iterator, self.engine)
        loss, num_tokens, report = loss_of(output)
        loss = loss / num_tokens.clamp(min=1) / self.num_microbatches
        self.engine.backward(loss, scale_wrt_gas=False)
        return report

    def _learning_rate(self) -> float:
        """That of the groups without a rate of their own, as rows of a code memory have."""
        usual = self.scheduler.max_lr
        return next(g["lr"] for g in self.optimizer.param_groups if g["max_lr"] == usual)

    def forward(
        self,
        iterators: list[Iterator[Batch]],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
    ) -> torch.Tensor:
        """As :func:`run_microbatches`."""
        return run_microbatches(
            self.task.forward_step,
            self.model,
            iterators,
            num_microbatches,
            seq_length,
            micro_batch_size,
            forward_only=True,
        )

    @property
    def layers(self) -> list[LayerStatistics]:
        """Those of the codebooks' synchronisation."""
        return self.codebook_sync.layers
