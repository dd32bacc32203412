"""Which stored tensor every tensor of a model is a copy of, and the copying.

L layers, N experts. Names are megatron-core's:

1. A layer's tensors are stored under its number (``decoder.layers.3.mlp...``), or all layers' in
   one with an axis of layers in front (``decoder.layers.mlp...``); a model may want the other form.
2. The norm before attention, or before the MLP, is stored under its own name, or under the one of
   Transformer Engine's linear layer that holds it.
3. Experts are one tensor [N, ...] by global id (``mlp.experts.experts.linear_fc1.weight``). A dense
   MLP (``mlp.linear_fc1.weight``), or the one expert of a dense model of ours, is every expert's.

A stored tensor is read whole, once, by torch's own reader, whatever layout wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed import checkpoint as torch_checkpoint

from vqmoe_megatron.checkpoint.content import readable
from vqmoe_megatron.checkpoint.metadata import StoredTensor
from vqmoe_megatron.engines.megatron.layout_independent_init import sharded_tensors
from vqmoe_megatron.upcycle.source import LAYER_NAME, Source

NORM_NAMES = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
OF_EXPERTS, OF_DENSE = "mlp.experts.experts.", "mlp."
ROUTER = "mlp.router."
OUTPUT = "mlp.experts.experts.linear_fc2."
# Parts of a VQMoE that no source has.
NEW_PARTS = re.compile(
    r"code_stream\.|mlp\.(assigner|code_inputs|code_map|code_memory|fill_rows|gate|input_norm"
    r"|memory_assigner|memory_gate|output_norm|threshold)\."
)
VOCABULARY = ("word_embeddings.", "output_layer.")


@dataclass(frozen=True)
class NewPart:
    """A tensor of the model that the source has not."""

    name: str  # without the layer
    layer: int | None  # from 0


@dataclass(frozen=True)
class _Wanted:
    """A tensor of the model, or an expert's part of one; axes without that of layers."""

    part: ShardedTensor
    name: str  # without the layer
    layer: int | None  # from 0
    offset: tuple[int, ...]  # in the global tensor
    shape: tuple[int, ...]
    whole: tuple[int, ...]  # shape of the global tensor

    @classmethod
    def of(cls, part: ShardedTensor) -> _Wanted:
        """Read name and place of ``part``."""
        shape = (*[1] * part.prepend_axis_num, *part.local_shape)
        found = LAYER_NAME.fullmatch(part.key)
        if found is None:
            return cls(part, part.key, None, part.global_offset, shape, part.global_shape)
        skipped = 0 if found[1] is not None else 1  # the axis of layers
        layer = int(found[1]) if found[1] is not None else part.global_offset[0]
        places = (part.global_offset[skipped:], shape[skipped:], part.global_shape[skipped:])
        return cls(part, found[2], layer, *places)


@dataclass(frozen=True)
class _Copy:
    """What a wanted tensor is made of."""

    wanted: _Wanted
    stored: StoredTensor
    is_stacked: bool  # the stored tensor has an axis of layers
    form: str  # same | dense_to_experts | expert_to_dense

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of one layer, in the form that is wanted."""
        shape = self.stored.shape[1:] if self.is_stacked else self.stored.shape
        if self.form == "dense_to_experts":
            return (1, *shape)
        return shape[1:] if self.form == "expert_to_dense" else shape

    @property
    def is_repeated(self) -> bool:
        """Whether one MLP becomes several experts."""
        is_expert = self.wanted.name.startswith(OF_EXPERTS)
        return is_expert and self.stored_shape[0] == 1 != self.wanted.whole[0]

    def problem(self) -> str | None:
        """Say why the shapes do not fit; None where they do."""
        found, wanted = self.stored_shape, self.wanted.whole
        if found == wanted or (self.is_repeated and found[1:] == wanted[1:]):
            return None
        text = f"{self.wanted.part.key}: source {list(found)}, this recipe {list(wanted)}"
        if any(name in self.wanted.name for name in VOCABULARY) and found[1:] == wanted[1:]:
            text += (
                "; another vocabulary, or one that Megatron padded otherwise: use a corpus with "
                f"the source's tokenizer, and model.make_vocab_size_divisible_by={found[0]}"
            )
        return text

    def cut_from(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of the stored tensor, in the shape of the model's."""
        value = whole[self.wanted.layer] if self.is_stacked else whole
        value = value.reshape(self.stored_shape)
        offset, shape = list(self.wanted.offset), list(self.wanted.shape)
        if self.is_repeated:
            offset[0], shape[0] = 0, 1
        for axis, (first, size) in enumerate(zip(offset, shape, strict=True)):
            value = value.narrow(axis, first, size)
        return value.expand(self.wanted.shape).reshape(self.wanted.part.local_shape)


def copy_tensors(
    model: torch.nn.Module, source: Source, output_scale: float = 1.0
) -> tuple[int, set[NewPart]]:
    """Fill ``model`` from ``source``, except what no source has. For a world of one rank.

    Args:
        model: inside Megatron's DDP, with ``sharded_state_dict``.
        source: the checkpoint; every tensor of its model must find its place.
        output_scale: of the second linear layer of experts that one dense MLP becomes.

    Returns:
        How many stored tensors were read, and what is new.

    Raises:
        ValueError: before the first copy, naming every tensor that does not fit.
    """
    copies: dict[str, list[_Copy]] = {}
    new: set[NewPart] = set()
    problems: set[str | None] = set()
    for wanted in map(_Wanted.of, sharded_tensors(model.sharded_state_dict())):
        copy = _find(source, wanted)
        if copy is not None:
            copies.setdefault(copy.stored.name, []).append(copy)
            problems.add(copy.problem())
        elif _is_new(source, wanted):
            new.add(NewPart(wanted.name, wanted.layer))
        else:
            problems.add(_missing(wanted))
    for name in source.tensors.keys() - copies.keys():
        shape = list(source.tensors[name].shape)
        problems.add(f"{name}: source {shape}, for which this recipe's model has no place")
    problems.discard(None)
    if problems:
        listed = "\n  - ".join(sorted(problems))
        raise ValueError(f"{source.folder} does not fit this recipe's model:\n  - {listed}")
    with torch.no_grad():
        for of_stored in copies.values():
            whole = _read(source.folder, of_stored[0].stored)
            for copy in of_stored:
                value = copy.cut_from(whole)
                if copy.is_repeated and copy.wanted.name.startswith(OUTPUT):
                    value = value.float() * output_scale
                copy.wanted.part.data.copy_(value)
    return len(copies), new


def _find(source: Source, wanted: _Wanted) -> _Copy | None:
    """The stored tensor under any of the names that it may have."""
    for name, form in _names_of(wanted.name):
        if wanted.layer is None:
            stored, is_stacked = source.tensors.get(name), False
        else:
            stored, is_stacked = source.of_layer(name, wanted.layer)
        if stored is not None:
            return _Copy(wanted, stored, is_stacked, form)
    return None


def _is_new(source: Source, wanted: _Wanted) -> bool:
    """Whether it is a part of a VQMoE, or the router of a layer that needs none in the source."""
    is_router = wanted.name.startswith(ROUTER)
    return bool(NEW_PARTS.match(wanted.name)) or (
        is_router and source.num_experts(wanted.layer) in (None, 1)
    )


def _names_of(name: str) -> Iterator[tuple[str, str]]:
    """Names under which a source may hold ``name``, and in which form."""
    yield name, "same"
    for pair in NORM_NAMES:
        for ours, theirs in (pair, pair[::-1]):
            if name.startswith(ours):
                yield theirs + name.removeprefix(ours), "same"
    if name.startswith(OF_EXPERTS):
        yield OF_DENSE + name.removeprefix(OF_EXPERTS), "dense_to_experts"
    elif name.startswith(f"{OF_DENSE}linear_fc"):
        yield OF_EXPERTS + name.removeprefix(OF_DENSE), "expert_to_dense"


def _missing(wanted: _Wanted) -> str:
    text = f"{wanted.part.key}: not in the source"
    if wanted.name.startswith("output_layer."):
        text += "; it is the embedding there: model.untie_embeddings_and_output_weights=false"
    elif wanted.name.endswith("bias"):
        text += "; model.add_bias_linear or model.normalization is another there"
    return text


def _read(folder: Path, stored: StoredTensor) -> torch.Tensor:
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    reader = torch_checkpoint.FileSystemReader(folder)
    with readable(folder):
        torch_checkpoint.load({stored.name: whole}, storage_reader=reader)
    return whole
