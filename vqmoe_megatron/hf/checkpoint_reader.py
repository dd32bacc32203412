"""Single tensors of a torch_dist checkpoint by name, whatever layout wrote it.

One tensor at a time is in memory. Megatron stores equal layers stacked, with an axis of layers in
front (``decoder.layers.mlp...``), or each under its number (``decoder.layers.2.mlp...``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from vqmoe_megatron.checkpoint.content import readable
from vqmoe_megatron.checkpoint.metadata import StoredTensor

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class CheckpointReader:
    """The tensors of one ``iter_`` folder; needs the process groups of one rank."""

    folder: Path
    stored: dict[str, StoredTensor]
    num_layers: int

    @classmethod
    def of(cls, folder: Path, stored: Iterable[StoredTensor], num_layers: int) -> CheckpointReader:
        """Of the tensors that a folder's metadata list."""
        return cls(folder, {tensor.name: tensor for tensor in stored}, num_layers)

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU. Communicates over the world, which is this process.

        Raises:
            ValueError: where there is none of that name.
        """
        stored = self._find(name)
        whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        return self._load(ShardedTensor.from_rank_offsets(name, whole))

    def has_of_layer(self, layer: int, name: str) -> bool:
        """Whether layer ``layer`` (from 0) has a tensor of that name."""
        return f"{LAYERS}{layer}.{name}" in self or f"{LAYERS}{name}" in self

    def read_of_layer(self, layer: int, name: str) -> torch.Tensor:
        """A tensor of one layer, numbered from 0; as :meth:`read`."""
        numbered = f"{LAYERS}{layer}.{name}"
        if numbered in self:
            return self.read(numbered)
        stacked = f"{LAYERS}{name}"
        stored = self._find(stacked)
        one = torch.empty(1, *stored.shape[1:], dtype=getattr(torch, stored.dtype))
        place = (0, layer, self.num_layers)
        return self._load(ShardedTensor.from_rank_offsets(stacked, one, place))[0]

    def _find(self, name: str) -> StoredTensor:
        if name not in self:
            raise ValueError(f"{self.folder} lacks {name}, a tensor of its own recipe")
        return self.stored[name]

    def _load(self, wanted: ShardedTensor) -> torch.Tensor:
        # One layer of several is asked for on purpose, which Megatron's check takes for a mistake.
        with readable(self.folder):
            loaded = dist_checkpointing.load(
                {"tensor": wanted}, str(self.folder), validate_access_integrity=False
            )
        return loaded["tensor"]
