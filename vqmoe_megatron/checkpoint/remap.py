"""Start a model from a checkpoint's weights: with other numbers of codes and experts, or as it is.

K codes per slice, N experts. Only weights and codebooks are taken over.

1. Every tensor of the new model is looked up in the checkpoint by its global name. The same shape:
   this rank's part is loaded as it is, whatever layouts wrote and read it.
2. Another size on the axis of codes or experts: new index i takes old index i mod the old size.
   Where this rank's indices do not wrap around, only they are read; else the whole axis is read
   into a temporary and the indices are picked.
3. Rows of a code memory stay what they are: row j N + e is row j of expert e, stored [N, R / N, H].
   All are read into a temporary, and this rank's are picked.
4. The code map is the new model's own (expert = row mod N). With other codes, usage is scaled to
   sum to one per slice, and the EMA's sums follow it. With equal numbers the map is read, too.
5. What the new model does not have is not read; what of it is new, such as a classification head,
   stays as it started.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from vqmoe_megatron.checkpoint.remap_rules import check_remap
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_saved_recipe
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.vq.codebook import Codebook

CODE_MAP = "code_map.expert_of_row"
CODE_PARTS = (".codebook.", ".code_inputs.")  # of the names of tensors with an axis of codes
EXPERT_PARTS = (".router.", ".experts.")  # and of experts
MEMORY_ROWS = ".code_memory.weight"
OF_OTHER_CODES = ("memory_assigner", "code_stream")  # codebooks whose number of codes is kept

Place = tuple[Any, ...]  # keys from the root of a nested state dict to a leaf


def load_remapped(
    folder: Path,
    model: list[torch.nn.Module],
    config: RunConfig,
    report: Callable[[str], None],
) -> None:
    """Fill ``model`` from the checkpoint in ``folder``; the optimizer is not touched.

    The caller then refreshes what the optimizer copied from the parameters
    (``optimizer.reload_model_params()``).

    Args:
        folder: an ``iter_`` folder that the preflight found whole, of any layout.
        model: this rank's chunks in Megatron's DDP, built for ``config`` at any layout.
        config: the new run's, with ``model.vocab_size`` filled in.
        report: told in sentences what changes; called on every rank.

    Communicates over the world; all ranks call it together.

    Raises:
        ValueError: on all ranks alike, for what cannot be remapped, by setting or by tensor.
    """
    stored_config = load_saved_recipe(folder / CONFIG_FILE)
    sentences = check_remap(stored_config, config)
    num_whole, num_remapped = load_weights(folder, model, config)
    if stored_config.vq.num_codes != config.vq.num_codes:
        for chunk in model:
            for name, module in chunk.named_modules():
                is_others = any(part in name for part in OF_OTHER_CODES)
                if isinstance(module, Codebook) and not is_others:
                    with torch.no_grad():
                        _rescale_usage(module)
    report(f"remapped {folder}: {num_whole} tensors as they are, {num_remapped} by index")
    for sentence in sentences:
        report(sentence)


def load_weights(
    folder: Path, model: list[torch.nn.Module], config: RunConfig, new: tuple[str, ...] = ()
) -> tuple[int, int]:
    """Fill ``model`` with weights and codebooks alone; arguments as for :func:`load_remapped`.

    ``new``: how names of tensors begin that stay as they are, whatever the checkpoint holds.

    Returns:
        The numbers of global tensors read as they are, and by index.

    Communicates over the world; all ranks call it together.

    Raises:
        ValueError: on all ranks alike, naming every tensor that does not fit.
    """
    reader = _RemappingReader(folder, load_saved_recipe(folder / CONFIG_FILE), config, new)
    with torch.no_grad():
        asked = {
            f"model{number}": reader.ask(chunk.module.sharded_state_dict(), (f"model{number}",))
            for number, chunk in enumerate(model)
        }
        counts = reader.agree()
        # Copies of an expert on several ranks read the same rows, which is no mistake here.
        loaded = dist_checkpointing.load(asked, str(folder), validate_access_integrity=False)
        for number, chunk in enumerate(model):
            state = reader.take(loaded[f"model{number}"], (f"model{number}",))
            chunk.module.load_state_dict(state)
    return counts


class _RemappingReader:
    """What to ask a checkpoint for, and how the answer becomes this rank's state."""

    def __init__(
        self, folder: Path, stored: RunConfig, wanted: RunConfig, new: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.new = new
        self.stored_shapes = {
            name: tuple(tensor.global_shape)
            for name, tensor in dist_checkpointing.load_tensors_metadata(str(folder)).items()
        }
        self.code_sizes = (stored.vq.num_codes, wanted.vq.num_codes)
        self.expert_sizes = (stored.model.num_moe_experts, wanted.model.num_moe_experts)
        # Of remapped tensors: global axis -> int64 stored indices, and the local shape.
        self.picks: dict[Place, tuple[dict[int, torch.Tensor], tuple[int, ...]]] = {}
        # Of rows of a code memory: global row numbers, as this rank's tensor is laid out.
        self.rows: dict[Place, torch.Tensor] = {}
        self.merges: dict[Place, Callable[[Any], torch.Tensor]] = {}
        self.is_remapped: dict[str, bool] = {}  # by global name
        self.problems: list[str] = []

    def ask(self, state: Any, place: Place) -> Any:
        """Return ``state``, a sharded state dict or a part of one, as the checkpoint can fill it.

        Problems are collected for :meth:`agree`. No communication.
        """
        if isinstance(state, dict):
            return {key: self.ask(part, (*place, key)) for key, part in state.items()}
        if isinstance(state, list):
            return [self.ask(part, (*place, number)) for number, part in enumerate(state)]
        if isinstance(state, ShardedTensorFactory):
            self.merges[place] = state.merge_fn
            return self.ask(state.build(), place)
        if isinstance(state, ShardedTensor) and not self._keeps(state.key):
            return self._ask_tensor(state, place)
        if isinstance(state, ShardedTensor | ShardedObject):
            # The code map, and the extra state of linear layers (of fp8, which is refused).
            return LocalNonpersistentObject(state.data)
        return state

    def _keeps(self, name: str) -> bool:
        """Whether the tensor of that name stays the new model's own."""
        sizes = (self.code_sizes, self.expert_sizes)
        is_other_map = name.endswith(CODE_MAP) and any(old != new for old, new in sizes)
        return is_other_map or name.startswith(self.new)

    def take(self, loaded: Any, place: Place) -> Any:
        """Return this rank's state from what the checkpoint answered to :meth:`ask`."""
        if isinstance(loaded, dict):
            loaded = {key: self.take(part, (*place, key)) for key, part in loaded.items()}
        elif isinstance(loaded, list):
            loaded = [self.take(part, (*place, number)) for number, part in enumerate(loaded)]
        if place in self.picks:
            indices, local_shape = self.picks[place]
            for axis, chosen in indices.items():
                loaded = loaded.index_select(axis, chosen.to(loaded.device))
            loaded = loaded.reshape(local_shape)
        if place in self.rows:
            by_number = loaded.squeeze(0) if loaded.dim() == 4 else loaded  # [N, R / N, H]
            by_number = by_number.transpose(0, 1).flatten(0, 1)  # [R, H]
            loaded = by_number[self.rows[place].to(loaded.device)]
        return self.merges[place](loaded) if place in self.merges else loaded

    def agree(self) -> tuple[int, int]:
        """Return the number of global tensors loaded as they are, and by index.

        Communicates: an all-gather over the world, so that all ranks refuse alike.

        Raises:
            ValueError: naming every tensor that does not fit.
        """
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, (self.problems, self.is_remapped))
        problems = sorted({problem for found, _ in everywhere for problem in found})
        if problems:
            raise ValueError(
                f"{self.folder} cannot be remapped to this model:\n  - " + "\n  - ".join(problems)
            )
        is_remapped = {name: flag for _, names in everywhere for name, flag in names.items()}
        return len(is_remapped) - sum(is_remapped.values()), sum(is_remapped.values())

    def _ask_tensor(self, part: ShardedTensor, place: Place) -> ShardedTensor:
        stored_shape, wanted_shape = self.stored_shapes.get(part.key), tuple(part.global_shape)
        problem = self._problem(part.key, stored_shape, wanted_shape)
        if problem is not None:
            self.problems.append(problem)
            return part
        self.is_remapped[part.key] = stored_shape != wanted_shape
        if stored_shape == wanted_shape:
            return part
        if part.key.endswith(MEMORY_ROWS):
            return self._ask_rows(part, place)
        # The local axes behind the prepended ones (layers), which are written out here: Megatron
        # reads a cut that fits no grid of equal cuts only without prepended axes.
        num_prepended = part.prepend_axis_num
        shape = [*[1] * num_prepended, *part.local_shape]
        offset = list(part.global_offset)
        indices = {}
        for axis, (old, new) in enumerate(zip(stored_shape, wanted_shape, strict=True)):
            if old == new:
                continue
            first, count = offset[axis], shape[axis]
            if first % old + count <= old:
                offset[axis] = first % old
            else:
                offset[axis], shape[axis] = 0, old
                indices[axis] = torch.arange(first, first + count) % old
        self.picks[place] = (indices, tuple(part.local_shape))
        return replace(
            part,
            data=None,
            local_shape=tuple(shape),
            global_shape=stored_shape,
            global_offset=tuple(offset),
            axis_fragmentations=None,
            prepend_axis_num=0,
        )

    def _ask_rows(self, part: ShardedTensor, place: Place) -> ShardedTensor:
        """All rows of this rank's layer; which of them are its own is noted."""
        stored_shape, num_prepended = self.stored_shapes[part.key], part.prepend_axis_num
        first_expert, first_row = part.global_offset[num_prepended : num_prepended + 2]
        num_experts, block, _ = part.local_shape
        experts = torch.arange(first_expert, first_expert + num_experts).unsqueeze(1)
        numbers = torch.arange(first_row, first_row + block).unsqueeze(0)
        self.rows[place] = numbers * part.global_shape[num_prepended] + experts
        return replace(
            part,
            data=None,
            local_shape=(*[1] * num_prepended, *stored_shape[num_prepended:]),
            global_shape=stored_shape,
            global_offset=(*part.global_offset[:num_prepended], 0, 0, 0),
            axis_fragmentations=None,
            prepend_axis_num=0,
        )

    def _problem(
        self, name: str, stored: tuple[int, ...] | None, wanted: tuple[int, ...]
    ) -> str | None:
        if stored is None:
            return f"{name}: not in the checkpoint"
        sizes = None
        if name.endswith(MEMORY_ROWS) and len(stored) == len(wanted):
            stored, wanted = _rows_joined(stored), _rows_joined(wanted)
        elif any(part in name for part in CODE_PARTS):
            sizes = self.code_sizes
        elif any(part in name for part in EXPERT_PARTS):
            sizes = self.expert_sizes
        fits = len(stored) == len(wanted) and all(
            old == new or (old, new) == sizes for old, new in zip(stored, wanted, strict=True)
        )
        if fits:
            return None
        return (
            f"{name}: checkpoint {list(stored)}, this model {list(wanted)}; only axes of codes and "
            "experts may differ"
        )


def _rows_joined(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[..., N, R / N, H] -> [..., R, H]."""
    *layers, num_experts, rows_of_expert, width = shape
    return *layers, num_experts * rows_of_expert, width


def _rescale_usage(codebook: Codebook) -> None:
    """Let usage [C, K] sum to one per slice again; codes that all went unused count alike."""
    total = codebook.usage.sum(dim=1, keepdim=True)
    uniform = torch.full_like(codebook.usage, 1.0 / codebook.num_codes)
    codebook.usage.copy_(torch.where(total > 0, codebook.usage / total, uniform))
    if codebook.keeps_sums:
        codebook.ema_sum.copy_(codebook.codes.data * codebook.usage.unsqueeze(-1))
