"""What a VQMoE has and its source has not, started so that the function stays the source's.

H hidden size, N experts, K codes, T sampled tokens.

1. Code memory and rows of fill are zero already. The norm behind a discrete path gets gain and bias
   zero: it says nothing, and learns to.
2. The router of experts that were one dense MLP starts so small that all probabilities are 1 / N
   to about 1e-5, where they weigh the outputs; tokens are still spread over the experts by it.
3. Codes are k-means centres of what their layer sees of the recipe's text. All parts being silent,
   that is what it saw in the source.
"""

from __future__ import annotations

import math

import torch

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.engines.engine import Engine
from vqmoe_megatron.moe.code_assigner import CodeAssigner
from vqmoe_megatron.moe.codebook_data_init import initialize_codebook
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.tasks.task import Task
from vqmoe_megatron.upcycle.tensor_map import NewPart

# Standard deviation of the logits on inputs of variance one: steps of fp32 probabilities are
# 6e-8 relative, so tokens are told apart, and probabilities differ by parts in 1e5.
LOGIT_STD = 4e-6
TOKENS_PER_CODE = 64  # sampled for k-means
MAX_MICROBATCHES = 64


def silence(model: torch.nn.Module, new: set[NewPart]) -> None:
    """Start what is ``new`` in ``model`` as steps 1 and 2 say."""
    for layer in model.modules():
        if not isinstance(layer, VQMoELayer):
            continue
        if layer.discrete_paths:
            for parameter in layer.output_norm.parameters():
                torch.nn.init.zeros_(parameter)
        if NewPart("mlp.router.weight", layer.layer_number - 1) in new:
            _start_router(layer.router, layer.config.moe_router_pre_softmax)


@torch.no_grad()
def _start_router(router: torch.nn.Module, is_pre_softmax: bool) -> None:
    if router.bias is not None:
        router.bias.zero_()
    if is_pre_softmax:  # else the chosen experts' weights sum to one, whatever they are
        weight = router.weight.float()
        std = LOGIT_STD / math.sqrt(weight.shape[1])
        router.weight.copy_(weight * (std / weight.std()))


def find_codes(engine: Engine, task: Task, config: RunConfig) -> dict[str, int]:
    """Set every codebook that starts from data by k-means; return tokens sampled by its name.

    The model evaluates microbatches of the recipe's training text, from its start, and every
    codebook collects what it sees; ``vq.init`` of the model's layers is ``kmeans``.

    Communicates over the world, which is this process.

    Raises:
        ValueError: for activations that are not finite.
    """
    assigners = {
        name: module
        for chunk in engine.model
        for name, module in chunk.module.named_modules()
        if isinstance(module, CodeAssigner) and module.codebook.needs_data_init
    }
    if not assigners:
        return {}
    samples: dict[str, list[torch.Tensor]] = {name: [] for name in assigners}
    hooks = [
        assigner.register_forward_pre_hook(_collect(samples[name]))
        for name, assigner in assigners.items()
    ]
    for assigner in assigners.values():
        assigner.codebook.needs_data_init = False  # not of the first microbatch alone
    _evaluate(engine, task, config, max(a.codebook.num_codes for a in assigners.values()))
    for hook in hooks:
        hook.remove()
    for name, assigner in assigners.items():
        sample = torch.cat(samples[name]).to(torch.cuda.current_device())
        if not bool(torch.isfinite(sample).all()):
            raise ValueError(f"{name} sees activations that are not finite: no codes can be found")
        initialize_codebook(assigner.codebook, assigner.code_map, sample, assigner.pg_collection)
    return {name: sum(map(len, parts)) for name, parts in samples.items()}


def _collect(into: list[torch.Tensor]):  # noqa: ANN202
    def hook(assigner: CodeAssigner, inputs: tuple[torch.Tensor]) -> None:
        into.append(assigner.codebook.prepare(inputs[0]).detach().float().cpu())

    return hook


@torch.no_grad()
def _evaluate(engine: Engine, task: Task, config: RunConfig, num_codes: int) -> None:
    train, seq_length = config.train, config.model.seq_length
    per_microbatch = train.micro_batch_size * seq_length
    wanted = min(math.ceil(TOKENS_PER_CODE * num_codes / per_microbatch), MAX_MICROBATCHES)
    there = train.train_iters * train.global_batch_size // train.micro_batch_size
    for chunk in engine.model:
        chunk.eval()
    iterators = task.training_iterators(len(engine.model), 0, 0)
    engine.forward(iterators, min(wanted, there), seq_length, train.micro_batch_size)
