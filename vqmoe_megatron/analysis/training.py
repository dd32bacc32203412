"""Short training in memory: a few updates of a loaded model, or of its codebooks alone.

b sequences of S tokens. The model's layers end their steps by themselves (``moe/foreign_loop``) or
when told (``synchronize_codebooks``). Callers put the model back to where it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch

from vqmoe_megatron.analysis.loaded_model import LoadedModel
from vqmoe_megatron.analysis.observation import losses_of
from vqmoe_megatron.moe import synchronize_codebooks
from vqmoe_megatron.tasks.task import Batch


def mean_loss(model: LoadedModel, batch: Batch) -> torch.Tensor:
    """Nats per scored token, differentiable."""
    losses = losses_of(model, batch["tokens"], batch)
    mask = batch["loss_mask"].to(losses)
    return (losses * mask).sum() / mask.sum()


def train(
    model: LoadedModel,
    batches: Iterable[Batch],
    learning_rate: float,
    after: Callable[[int], None],
) -> None:
    """One Adam update at a fixed rate per batch, without decay; ``after`` is told how many there
    were, with the model in evaluation.

    Codebooks move by their own rules, as in training. Communicates within this process' world.
    """
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for number, batch in enumerate(batches, start=1):
        model.module.train()
        with torch.enable_grad():
            mean_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.module.eval()
        after(number)


def move_codebooks(model: LoadedModel, batch: Batch) -> None:
    """Let one batch move the codebooks by their EMA, and nothing else.

    Layers with experts are in training for it, since only there codebooks record what they see, the
    rest is in evaluation. What a router moves with a step (biases, a count of steps) is put back.
    Communicates within this process' world.
    """
    routers = [layer.router for layer in model.layers if layer.router is not None]
    before = [copy.deepcopy(router.state_dict()) for router in routers]
    for layer in model.layers:
        layer.train()
    with torch.enable_grad():
        mean_loss(model, batch).backward()
    synchronize_codebooks(model.module)
    for router, state in zip(routers, before, strict=True):
        router.load_state_dict(state)
    model.module.zero_grad(set_to_none=True)
    model.module.eval()
