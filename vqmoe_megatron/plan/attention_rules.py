"""What Transformer-XL's attention does not go with, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vqmoe_megatron.config import RunConfig

if TYPE_CHECKING:
    from vqmoe_megatron.plan.layout import ParallelLayout

NAME = "model.attention=transformer_xl"
LOCAL_ONLY = (
    "it is made of Megatron's local modules, and Transformer Engine's linear layers and attention "
    "have no place for its relative scores"
)


def attention_errors(config: RunConfig, layout: ParallelLayout, device: str) -> Iterator[str]:
    """Yield every rule that a recipe with this attention breaks; nothing for another attention.

    ``device`` is ``cpu``, ``cuda``, or ``auto`` where it is not known yet.
    """
    if config.model.attention != "transformer_xl":
        return
    yield from _kernel_errors(config, device)
    yield from _reading_errors(config)
    if (size := layout.context_parallel_size) > 1:
        yield (
            f"{NAME} with context_parallel_size = {size} > 1: a rank's part of a segment would "
            "need the whole memory and the distances across the cut; use 1"
        )
    if config.train.engine != "megatron":
        yield (
            f"{NAME} with train.engine={config.train.engine}: its memory was wired to Megatron's "
            "schedules only; use train.engine=megatron"
        )


def _kernel_errors(config: RunConfig, device: str) -> Iterator[str]:
    model = config.model
    impl = model.transformer_impl
    if impl == "transformer_engine" or (impl == "auto" and device == "cuda"):
        yield f"{NAME} with model.transformer_impl={impl}: {LOCAL_ONLY}; set it to local"
    if model.fp8 is not None:
        yield f"{NAME} with model.fp8={model.fp8}: {LOCAL_ONLY}; leave it out"
    fusion = model.gradient_accumulation_fusion
    if model.memory_length_tokens and (fusion or (fusion is None and device == "cuda")):
        yield (
            f"{NAME} with a memory and model.gradient_accumulation_fusion="
            f"{'true' if fusion else 'null'}: the memory's keys add to the gradient of the "
            "projection as torch does, which Apex's kernel passes over; set it to false"
        )
    if config.train.cuda_graphs:
        yield f"{NAME} with train.cuda_graphs was never tried; set it to false"


def _reading_errors(config: RunConfig) -> Iterator[str]:
    model = config.model
    for name in ("eval_window_tokens", "eval_stride_tokens"):
        value = getattr(config.data, name)
        if value is not None and value != model.seq_length:
            yield (
                f"{NAME} with data.{name}={value}: evaluation reads segments one behind the other, "
                "so that memory carries over; leave it out"
            )
    if config.code_memory.is_on and config.code_memory.num_context_codes:
        yield (
            f"{NAME} with code_memory.num_context_codes={config.code_memory.num_context_codes}: "
            "contexts begin anew with every segment, though the text goes on; set it to 0"
        )
    if model.memory_length_tokens and config.train.nan_policy != "stop":
        yield (
            f"model.memory_length_tokens={model.memory_length_tokens} with train.nan_policy="
            f"{config.train.nan_policy}: the memory would keep what the bad step computed, and a "
            "rollback leaves text out of the streams; use stop"
        )
