"""The VQMoE layers of a checkpoint, one after the other, in one process.

A layer needs nothing of the others, so no model is built: memory holds one layer at a time,
whatever layout wrote the checkpoint. Megatron stores equal layers stacked, as
``decoder.layers.mlp.*`` with an axis of layers in front, and layers of different kinds (VQMoE every
``moe_layer_freq`` layers) each under its number from 0, as ``decoder.layers.2.mlp.*``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.checkpoint.content import readable
from vqmoe_megatron.checkpoint.state import FORMAT_VERSION
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.engines.megatron.model import build_transformer_config
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.memory.code_stream import CodeStream
from vqmoe_megatron.moe.memory.path import LayerMemory
from vqmoe_megatron.moe.spec import get_vqmoe_layer_spec
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.parameters import padded_vocab_size

STREAM_PREFIX = "code_stream."
LAYER_NAME = r"^(decoder\.layers\.(?:(\d+)\.)?mlp\.)"
# By tensors that only they have: layers with codes or memory, and all that have experts.
WITH_CODES = re.compile(LAYER_NAME + r"(?:assigner\.codebook\.codes|code_memory\.weight)$")
WITH_EXPERTS = re.compile(LAYER_NAME + r"experts\.experts\.linear_fc1\.weight$")


@dataclass(frozen=True)
class LayerPlace:
    """Where a checkpoint keeps one layer."""

    prefix: str  # of its tensors' names
    offsets: tuple[tuple[int, int, int], ...]  # Megatron's (axis, index, size) of a stacked layer


def layer_places(
    names: list[str], num_layers: int, wanted: re.Pattern[str] = WITH_CODES
) -> dict[int, LayerPlace]:
    """Return layer number (from 1) -> place, of the ``wanted`` layers among stored ``names``."""
    places: dict[int, LayerPlace] = {}
    for found in filter(None, map(wanted.match, names)):
        prefix, index = found.groups()
        if index is not None:
            places[int(index) + 1] = LayerPlace(prefix, ())
            continue
        for number in range(num_layers):
            places[number + 1] = LayerPlace(prefix, ((0, number, num_layers),))
    return dict(sorted(places.items()))


def stored_layers(
    folder: Path,
    config: RunConfig,
    layout: ParallelLayout,
    names: list[str],
    wanted: re.Pattern[str] = WITH_CODES,
) -> Iterator[VQMoELayer]:
    """Build and load the ``wanted`` layers, by number, in evaluation and in code space.

    Args:
        folder: a complete ``iter_`` folder, written at any layout.
        config: the recipe in it; a discrete path has expert_input=code.
        layout: of one rank, whose process groups stand.
        names: of the stored tensors.

    Communicates over the world, which is this process.

    Raises:
        ValueError: for another checkpoint format, or tensors that are not there.
    """
    version = dist_checkpointing.load_common_state_dict(str(folder)).get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint format {version}, this release reads {FORMAT_VERSION}"
        )
    places = layer_places(names, config.model.num_layers, wanted)
    if not places:
        raise ValueError(
            f"{folder} holds no layer with codes (decoder.layers.*.assigner.codebook) or code "
            "memory (decoder.layers.*.code_memory)"
        )
    transformer = _transformer_config(config, layout)
    stream = _new_stream(config, transformer)
    memory = stream and LayerMemory(config.code_memory, stream, config.train.seed)
    # However it was trained: with one expert input per code both executions are the same function.
    vq = config.vq
    if vq.path != "continuous":
        vq = replace(vq, execution="code_space", table_per_step=False, overlap_table=False)
    spec = get_vqmoe_layer_spec(transformer, vq, config.train.seed).submodules.mlp
    for number, place in places.items():
        carried = memory if config.code_memory.carries(number) else None
        layer = build_module(spec, config=transformer, layer_number=number, memory=carried)
        _load(layer, folder, place, set(names))
        layer.eval()
        yield layer


def stored_stream(
    folder: Path, config: RunConfig, layout: ParallelLayout, names: list[str]
) -> CodeStream | None:
    """Build and load the model's stream of codes; None without a code memory.

    Args and what it communicates as :func:`stored_layers`.

    Raises:
        ValueError: for tensors that are not there, or a vocabulary of unknown size.
    """
    stream = _new_stream(config, _transformer_config(config, layout))
    if stream is not None:
        _load(stream, folder, LayerPlace(STREAM_PREFIX, ()), set(names))
    return stream


def _new_stream(config: RunConfig, transformer: TransformerConfig) -> CodeStream | None:
    if not config.code_memory.is_on:
        return None
    vocab_size, groups = padded_vocab_size(config.model), get_default_pg_collection()
    return CodeStream(transformer, config.code_memory, vocab_size, groups, config.train.seed)


def _transformer_config(config: RunConfig, layout: ParallelLayout) -> TransformerConfig:
    """Of one rank, on which every value is loaded; a shared expert is no part of what is built."""
    # Trained in fp8 or not, weights are stored in bf16 or fp32.
    model = replace(config.model, fp8=None, moe_shared_expert_intermediate_size=None)
    transformer = build_transformer_config(replace(config, model=model), layout)
    transformer.perform_initialization = False
    return transformer


def _load(
    layer: VQMoELayer | CodeStream, folder: Path, place: LayerPlace, stored: set[str]
) -> None:
    wanted = layer.sharded_state_dict(place.prefix, place.offsets)
    lacking = sorted({part.key for part in wanted.values()} - stored)
    if lacking:
        raise ValueError(f"{folder} lacks tensors of its own recipe: {', '.join(lacking)}")
    asked = {"layer": {name: _one_of_stacked(part) for name, part in wanted.items()}}
    # One layer of several is asked for on purpose, which Megatron's check takes for a mistake.
    with readable(folder):
        loaded = dist_checkpointing.load(asked, str(folder), validate_access_integrity=False)
    loaded = loaded["layer"]
    layer.load_state_dict(
        {
            name.removeprefix(place.prefix): loaded[name].reshape(part.local_shape)
            for name, part in wanted.items()
        }
    )


def _one_of_stacked(part: ShardedTensor) -> ShardedTensor:
    """Ask for one layer of a stacked tensor: with the axis of layers written out.

    With a prepended axis Megatron wants every index of it on some rank.
    """
    if part.prepend_axis_num == 0:
        return part
    return replace(
        part,
        data=None,
        local_shape=(*[1] * part.prepend_axis_num, *part.local_shape),
        axis_fragmentations=None,
        prepend_axis_num=0,
    )
