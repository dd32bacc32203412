"""Back from an export to the modules of a model of one rank, and what an export must add for that.

A tensor of the model is either said by the weights, bit for bit, or it is in the training files,
under its name in a model of one rank: codebooks with their sums and counters, code maps, experts
whose outputs are a table only. Of word embeddings and the output layer those hold the entries that
pad the vocabulary.

N experts, R rows of a code memory, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.models.gpt import GPTModel

from vqmoe_megatron.checkpoint.stored_layers import STREAM_PREFIX
from vqmoe_megatron.hf.checkpoint_reader import CheckpointReader
from vqmoe_megatron.hf.shards import TensorFiles
from vqmoe_megatron.hf.tensors import EXPERT_PARTS, MOE_PARTS, OUTER, PADDED, PLAIN, Named
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.memory.code_stream import CodeStream

LAYERS = "decoder.layers."
EXTRA_STATE = "_extra_state"  # Transformer Engine's, of fp8
Find = Callable[[str], torch.Tensor | None]  # a tensor of the weights by name


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a module, by name in it."""
    state = module.state_dict()
    return {name: t for name, t in state.items() if not name.endswith(EXTRA_STATE)}


def padding_tensors(reader: CheckpointReader, vocab_size: int) -> Named:
    """The entries that pad the vocabulary: they count in the loss's denominator."""
    for name in PADDED:
        if name in reader and (rows := reader.read(name)[vocab_size:]).shape[0]:
            yield name, rows.contiguous()


def tensors_of_stream(stream: CodeStream) -> Named:
    """All of a model's stream of codes."""
    for name, own in tensors_of(stream).items():
        yield f"{STREAM_PREFIX}{name}", own.detach().cpu().contiguous()


def unsaid_tensors(layer: VQMoELayer, found: dict[str, torch.Tensor]) -> Named:
    """What of a loaded MoE layer its exported tensors ``found`` do not say bit for bit."""
    number = layer.layer_number - 1
    said = _moe_state(layer, lambda name: found.get(f"model.layers.{number}.mlp.{name}"))
    for name, own in tensors_of(layer).items():
        own = own.detach().cpu().contiguous()
        if name not in said or not said[name].equal(own):
            yield f"{LAYERS}{number}.mlp.{name}", own


@torch.no_grad()
def fill_model(model: GPTModel, weights: TensorFiles, training: TensorFiles) -> int:
    """Load every tensor of a whole model; return how many there are. No communication.

    Args:
        model: Megatron's, without wrappers, all layers on this rank.
        weights: of the export.
        training: of its training files.

    Raises:
        ValueError: naming the tensors that neither holds, or in another shape.
    """
    modules: dict[str, torch.nn.Module] = {
        "embedding.": model.embedding,
        "decoder.final_layernorm.": model.decoder.final_layernorm,
        "output_layer.": model.output_layer,
    }
    if hasattr(model, "code_stream"):
        modules[STREAM_PREFIX] = model.code_stream
    modules |= {f"{LAYERS}{n}.": layer for n, layer in enumerate(model.decoder.layers)}
    open_names = set(tensors_of(model))
    num_tensors = len(open_names)
    problems: list[str] = []
    for prefix, module in modules.items():
        found = _state(prefix, module, weights, training)
        wanted = tensors_of(module)
        for name, own in wanted.items():
            have = found.get(name)
            if have is None or have.shape != own.shape:
                shape = "missing" if have is None else f"of shape {list(have.shape)}"
                problems.append(f"{prefix}{name}: {shape}, not {list(own.shape)}")
        if not problems:
            module.load_state_dict({**module.state_dict(), **found})
        open_names -= {prefix + name for name in wanted}
    problems += [f"{name}: no part of an export" for name in sorted(open_names)]
    if problems:
        raise ValueError(
            f"{weights.folder} does not hold the model of its own recipe:\n  - "
            + "\n  - ".join(problems)
        )
    return num_tensors


def _state(
    prefix: str, module: torch.nn.Module, weights: TensorFiles, training: TensorFiles
) -> dict[str, torch.Tensor]:
    """What the files hold of one module; of the training files' tensors all count."""
    names = tensors_of(module)
    found: dict[str, torch.Tensor] = {}
    if prefix.startswith(LAYERS):
        number = prefix.removeprefix(LAYERS).rstrip(".")
        found = _plain_state(names, lambda name: weights.find(f"model.layers.{number}.{name}"))
        if isinstance(module.mlp, VQMoELayer):
            of_moe = _moe_state(
                module.mlp, lambda name: weights.find(f"model.layers.{number}.mlp.{name}")
            )
            found |= {f"mlp.{name}": tensor for name, tensor in of_moe.items()}
    for name in names:
        full = prefix + name
        if full in OUTER and (tensor := weights.find(OUTER[full])) is not None:
            found[name] = tensor
        if (tensor := training.find(full)) is not None:
            is_padding = full in PADDED and name in found
            found[name] = torch.cat([found[name], tensor]) if is_padding else tensor
    return found


def _plain_state(names: dict[str, torch.Tensor], find: Find) -> dict[str, torch.Tensor]:
    """What a layer keeps as it is read. The first owner counts: norms stand before what they may
    be fused into."""
    state = {}
    for name in names:
        places = ((ours, theirs) for ours, owners in PLAIN.items() for theirs in owners)
        for ours, theirs in places:
            if name.startswith(theirs):
                if (tensor := find(ours + name.removeprefix(theirs))) is not None:
                    state[name] = tensor
                break
    return state


def _moe_state(layer: VQMoELayer, find: Find) -> dict[str, torch.Tensor]:
    """What the weights say of a MoE layer, by name in it, in its dtypes; ``find`` knows names
    below the layer's."""
    state = {}
    for name, own in tensors_of(layer).items():
        tensor = _of_moe(layer, name, find)
        if tensor is not None and tensor.numel() == own.numel():
            state[name] = tensor.to(own.dtype).view(own.shape)
    return state


def _of_moe(layer: VQMoELayer, name: str, find: Find) -> torch.Tensor | None:
    if name in MOE_PARTS:
        return find(MOE_PARTS[name])
    owner, _, part = name.rpartition(".")
    if owner == "experts" and part in EXPERT_PARTS:
        ours = EXPERT_PARTS[part]
        parts = [find(f"experts.{n}.{ours}") for n in range(layer.config.num_moe_experts)]
        return None if any(one is None for one in parts) else torch.stack(parts)
    if name == "code_memory.weight" and (rows := find("memory.rows")) is not None:
        slots = layer.code_memory.places.slots(torch.arange(rows.shape[0]))
        return torch.empty_like(rows).index_copy_(0, slots, rows)
    return None
