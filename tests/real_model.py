"""A real model on real ranks, measured: its parameters, what it keeps, what a forward pass saves.

The plan's formulas are compared with these figures. Functions here run in the ranks; the recipe is
``recipes/parity.yaml`` with the overrides given.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "parity.yaml"
SMALL = [
    "model.vocab_size=300", "model.seq_length=16", "model.hidden_size=48",
    "model.num_attention_heads=4", "model.moe_ffn_hidden_size=64", "train.global_batch_size=8",
]  # fmt: skip


def recipe(overrides: Iterable[str]) -> RunConfig:
    """The tiny recipe with ``overrides`` behind the small sizes."""
    return load_recipe(RECIPE, [*SMALL, *overrides])


def task_of(config: RunConfig) -> Any:
    """Its loss; batches are made here."""
    from vqmoe_megatron.tasks.pretrain import Pretrain

    return Pretrain(config, corpus=None)


def measure_state(overrides: list[str]) -> dict[str, Any]:
    """Train four steps on random tokens; return this rank's place, parameters and bytes kept."""
    from megatron.core import parallel_state

    from vqmoe_megatron.engines.megatron.engine import MegatronEngine
    from vqmoe_megatron.plan.layout import check_layout

    config = recipe(overrides)
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    parts = MegatronEngine.build(config, layout, task_of(config))
    for chunk in parts.model:
        chunk.train()
    for _ in range(4):  # codebooks of contexts begin at the second's end, and move from the fourth
        parts.step([_batches(config) for _ in parts.model], 0, False)
    chunks = [_unwrapped(chunk) for chunk in parts.model]
    weights = _storages(p for chunk in chunks for p in chunk.parameters())
    buffers = [b for chunk in parts.model for b in chunk.buffers + chunk.expert_parallel_buffers]
    kept: dict[str, dict[int, int]] = {"main_parameters": {}, "moments": {}}
    for part in getattr(parts.optimizer, "chained_optimizers", [parts.optimizer]):
        adam = part.optimizer
        for group in adam.param_groups:
            kept["main_parameters"] |= _storages(group["params"])
            for parameter in group["params"]:
                state = adam.state[parameter]
                kept["moments"] |= _storages([state["exp_avg"], state["exp_avg_sq"]])
    main = {place: n for place, n in kept["main_parameters"].items() if place not in weights}
    return {
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "expert_data": parallel_state.get_expert_data_parallel_rank(),
        "parameters": [
            [(n, tuple(p.shape), p.element_size()) for n, p in chunk.named_parameters()]
            for chunk in chunks
        ],
        "buffer_elements": [buffer.numel for buffer in buffers],
        "weights": sum(weights.values()),
        "gradients": sum(_storages(buffer.grad_data for buffer in buffers).values()),
        "main_parameters": sum(main.values()),
        "moments": sum(kept["moments"].values()),
        "statistics": sum(_storages(_statistics(chunks)).values()),
    }


def _statistics(chunks: list[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        yield from chunk.buffers()
        for module in chunk.modules():
            if getattr(module, "probe_ids", None) is not None:
                yield module.probe_ids


def _unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _batches(config: RunConfig) -> Iterator[dict[str, torch.Tensor]]:
    size = (config.train.micro_batch_size, config.model.seq_length)
    while True:
        tokens = torch.randint(config.model.vocab_size, size)
        positions = torch.arange(size[1]).expand(size).contiguous()
        yield {"tokens": tokens, "labels": tokens, "position_ids": positions,
               "loss_mask": torch.ones(size)}  # fmt: skip


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of every distinct storage that is not empty."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def measure_activations(overrides: list[str]) -> int:
    """Bytes that one microbatch's forward pass keeps on this rank (one model chunk)."""
    from vqmoe_megatron.bench.saved_tensors import saved_bytes
    from vqmoe_megatron.engines.megatron.engine import MegatronEngine
    from vqmoe_megatron.plan.layout import check_layout

    config = recipe(overrides)
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    (chunk,) = MegatronEngine.build(config, layout, task_of(config)).model
    chunk.train()
    batch = next(_batches(config))
    excluded = [*chunk.parameters(), *chunk.module.buffers(), *batch.values()]

    def forward() -> torch.Tensor:
        losses = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses.float().sum()

    forward()  # the codebook takes its first codes from the data
    excluded += [*chunk.module.buffers()]
    return saved_bytes(forward, excluded)[0]


class PeakBytes(TorchDispatchMode):
    """Counts the storages that operations make while they live; ``peak`` is the most at once, and
    ``largest`` the largest one.

    What was there before does not count, nor what gloo makes inside of a collective, the copies
    by which it does without a reduce-scatter: NCCL has one. Of those only views are ever seen.
    ``device_type``: of all storages that count; None counts every device.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        # Held, so that no other storage comes to lie in the place of one that is gone.
        self.kept = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors
        }
        self.alive: dict[int, int] = {}
        self.peak = self.largest = self._total = 0

    def _free(self, place: int) -> None:
        self._total -= self.alive.pop(place)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages_in((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages_in(made):
            place, num_bytes = storage._cdata, storage.nbytes()
            if self.device_type not in (None, storage.device.type):
                continue
            if place not in self.kept and place not in self.alive and place not in given:
                self.alive[place] = num_bytes
                self._total += num_bytes
                self.largest = max(self.largest, num_bytes)
                weakref.finalize(storage, self._free, place)
        self.peak = max(self.peak, self._total)
        return made


def _storages_in(held: Any) -> Iterator[Any]:
    for leaf in tree_leaves(held):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()


def measure_peak(overrides: list[str]) -> int:
    """Most bytes that a training step makes and holds at once, beside what it keeps anyway."""
    from vqmoe_megatron.engines.megatron.engine import MegatronEngine
    from vqmoe_megatron.plan.layout import check_layout

    config = recipe(overrides)
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    parts = MegatronEngine.build(config, layout, task_of(config))
    for chunk in parts.model:
        chunk.train()
    batches = _batches(config)
    parts.step([batches], 0, False)  # makes the optimizer's state, and the codes from the data
    parts.step([batches], 0, False)  # and the probes' codes
    gc.collect()
    with PeakBytes() as bytes_made:
        parts.step([batches], 0, False)
    return bytes_made.peak


class _OneModule:
    """Everything belongs to the whole model: hooks on autograd would forbid what the layer does."""

    parents = {"Global"}

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Scores and values of all pairs of ``[b, A, S, d]`` and ``[b, G, S, d]``."""
    batch, heads, length, columns = query
    return 2 * 2 * batch * heads * length * key[2] * columns


def _attention_backward_flops(_grad: torch.Size, *states: torch.Size, **__: Any) -> int:
    """Gradients of both products; the scores, made anew, are left out."""
    return 2 * _attention_flops(*states)


ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def measure_flops(overrides: list[str]) -> list[int]:
    """Operations of one microbatch on one rank, [forward, backward], as torch counts them.

    In fp64, where every expert's product is a plain one that the counter knows. It does not know
    torch's attention on a CPU (:data:`ATTENTION_FLOPS`).
    """
    from torch.utils.flop_counter import FlopCounterMode

    from vqmoe_megatron.engines.megatron.model import build_model, build_transformer_config
    from vqmoe_megatron.plan.layout import check_layout

    config = recipe([*overrides, "model.moe_router_dtype=fp64"])
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    transformer = build_transformer_config(config, layout)
    (wrapped,) = build_model(config, transformer, layout)
    model = _unwrapped(wrapped)
    wrapped.grad_accs = []  # its hooks add to fp32 buffers
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    model.double()
    batch = next(_batches(config))
    tokens, positions = batch["tokens"], batch["position_ids"]
    model(tokens, positions, None, labels=tokens)  # codes from the data
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    counter.mod_tracker = _OneModule()
    with counter:
        loss = model(tokens, positions, None, labels=tokens).sum()
        forward = counter.get_total_flops()
        loss.backward()
        return [forward, counter.get_total_flops() - forward]
