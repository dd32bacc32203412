"""Tensors into safetensors files of bounded size, with the index that Transformers reads; and back.

Files are called ``STEM-00001-of-00002.safetensors``; Transformers reads those of the stem model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vqmoe_megatron.rundir.own_outputs import said_as_refusal

MAX_SHARD_BYTES = 4 * 10**9
STEM = "model"


def index_name(stem: str = STEM) -> str:
    """The file that says which of a stem's files holds which tensor."""
    return f"{stem}.safetensors.index.json"


@dataclass
class Shards:
    """The files of one stem in a folder; at most one shard's tensors are held."""

    folder: Path
    max_shard_bytes: int = MAX_SHARD_BYTES
    stem: str = STEM
    num_parameters: int = 0
    total_bytes: int = 0
    _held: dict[str, torch.Tensor] = field(default_factory=dict)
    _held_bytes: int = 0
    _written: list[list[str]] = field(default_factory=list)

    def add(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take tensors on the CPU; full shards are written."""
        for name, tensor in named:
            num_bytes = tensor.numel() * tensor.element_size()
            if self._held and self._held_bytes + num_bytes > self.max_shard_bytes:
                self._write()
            self._held[name] = tensor
            self._held_bytes += num_bytes
            self.num_parameters += tensor.numel()
            self.total_bytes += num_bytes

    def finish(self) -> list[str]:
        """Write what is left, give the files their names and write the index; return all names."""
        if self._held or not self._written:
            self._write()
        count = len(self._written)
        of_tensor, names = {}, []
        for number, tensors in enumerate(self._written, 1):
            names.append(f"{self.stem}-{number:05d}-of-{count:05d}.safetensors")
            self._file(number).rename(self.folder / names[-1])
            of_tensor |= dict.fromkeys(tensors, names[-1])
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": of_tensor}
        with said_as_refusal(self.folder):
            path = self.folder / index_name(self.stem)
            path.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        return [*names, path.name]

    def _write(self) -> None:
        self._written.append(list(self._held))
        with said_as_refusal(self.folder, SafetensorError):
            save_file(self._held, self._file(len(self._written)), {"format": "pt"})
        self._held, self._held_bytes = {}, 0

    def _file(self, number: int) -> Path:
        return self.folder / f"{self.stem}_{number}"


@dataclass(frozen=True)
class TensorFiles:
    """The same files, read tensor by tensor."""

    folder: Path
    stem: str = STEM

    @cached_property
    def file_of(self) -> dict[str, str]:
        """The file of every tensor, by its name."""
        return json.loads((self.folder / index_name(self.stem)).read_text("utf-8"))["weight_map"]

    def find(self, name: str) -> torch.Tensor | None:
        """A tensor on the CPU; None where there is none of that name."""
        if name not in self.file_of:
            return None
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            return file.get_tensor(name)
