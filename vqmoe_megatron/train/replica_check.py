"""Do all replicas hold the same bits? A check between ranks that costs little.

A piece is what one rank holds of one global tensor: its name, its offset and its shape. Ranks that
hold the same piece are its replicas, whatever layout made them so: tensor parallel copies of a
norm, data-parallel copies, expert-data-parallel copies of experts, codebooks, tied embeddings.

1. Gather what an overlapped optimizer has not distributed yet.
2. Fingerprint every piece on the device it lives on: two numbers of 64 bits.
3. Rank 0 gathers the fingerprints, compares them and tells everyone.

The fingerprint is a tree of weighted integer sums over the bit pattern: integer sums are exact in
any order, run where the tensor is and in all its threads, and need one copy to the host for all
pieces together. A cryptographic hash would first copy a whole GPU's model to the host. Weights are
odd, so any change of one element changes every sum above it; random, so moved, swapped or negated
elements do not cancel.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from vqmoe_megatron.engines.megatron.stale_parameters import gather_parameters
from vqmoe_megatron.runtime.rank_names import rank_names

ROW = 1 << 16  # elements that one sum takes in
BLOCK_ROWS = {"cpu": 1, "cuda": 64}  # at once: in cache on a CPU, 32 MiB of int64 on a GPU
INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHOWN_PIECES = 20
SHOWN_DIGITS = 8
# What a piece belongs to, most telling first: a codebook that differs soon makes the rest differ.
KINDS = ("codebook", "expert", "parameter")


class ReplicaMismatch(RuntimeError):
    """Replicas hold different bits; the message is the same on all ranks."""


@dataclass(frozen=True)
class Piece:
    """A part of a global tensor. Two ranks that hold an equal one are replicas of each other."""

    key: str
    offset: tuple[int, ...]  # in the global tensor; layers may be its first axis
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        codebooks = (".codebook.", ".code_map.", ".threshold.", "code_stream.")
        if any(part in self.key for part in codebooks):
            return "codebook"
        of_experts = (".experts.", ".fill_rows.", ".code_memory.")
        return "expert" if any(part in self.key for part in of_experts) else "parameter"

    @property
    def name(self) -> str:
        """The key, with the layer's global number also where layers are an axis of the tensor."""
        if len(self.offset) > len(self.shape) and ".layers." in self.key:
            return self.key.replace(".layers.", f".layers.{self.offset[0]}.", 1)
        return self.key

    @property
    def order(self) -> tuple:
        """By kind, then by name with numbers as numbers."""
        words = re.split(r"(\d+)", self.name)
        return KINDS.index(self.kind), [int(w) if w.isdecimal() else w for w in words], self.offset


def check_replicas(model: list[torch.nn.Module], iteration: int) -> int:
    """Compare every piece that at least two ranks hold; return their number.

    Communicates over the world: one gather to rank 0 and one broadcast; before them over the
    data-parallel groups when parameters are gathered late. All ranks call it together.

    Args:
        model: this rank's chunks, each in Megatron's DDP.
        iteration: named in the message.

    Raises:
        ReplicaMismatch: on all ranks, when any replica differs in any bit.
    """
    gather_parameters(model)
    is_first = torch.distributed.get_rank() == 0
    gathered: list = [None] * torch.distributed.get_world_size() if is_first else []
    torch.distributed.gather_object(fingerprints(model), gathered if is_first else None, dst=0)
    verdict = list(compare_fingerprints(gathered, iteration)) if is_first else [None, None]
    torch.distributed.broadcast_object_list(verdict, src=0)
    text, num_compared = verdict
    if text is not None:
        raise ReplicaMismatch(text)
    return num_compared


def fingerprints(model: list[torch.nn.Module]) -> dict[Piece, str]:
    """32 hexadecimal digits for every piece this rank holds, buffers included.

    Parameters must be up to date (``gather_parameters``). No communication; one copy to the host.
    """
    sums: dict[Piece, torch.Tensor] = {}
    for chunk in model:
        state = chunk.module.sharded_state_dict()
        apply_factories(state)
        for part in nested_values(state):
            if isinstance(part, ShardedTensor):
                piece = Piece(part.key, tuple(part.global_offset), tuple(part.local_shape))
                sums[piece] = fingerprint(part.data)
    numbers = torch.stack(list(sums.values())).tolist()
    return {
        piece: "".join(f"{number % 2**64:016x}" for number in pair)
        for piece, pair in zip(sums, numbers, strict=True)
    }


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """int64 ``[2]`` on the tensor's device, from the bits and their order; any shape, any dtype."""
    flat = tensor.detach().contiguous().reshape(-1)
    values = flat.view(INTEGER_OF_SIZE[min(flat.element_size(), 8)]).unsqueeze(0)  # [1, n]
    weights = _weights(values.device)
    while values.shape != (2, 1):
        values = _row_sums(values, weights)  # [2, ceil(n / ROW)]
    return values.squeeze(1)


def _row_sums(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Integers ``[1 or 2, n]`` -> int64 ``[2, max(1, ceil(n / ROW))]``, modulo 2**64."""
    num_values = values.shape[1]
    num_rows = num_values // ROW
    rows = values[:, : num_rows * ROW].unflatten(1, (num_rows, ROW))
    parts = [
        (block.long() * weights.unsqueeze(1)).sum(dim=2)
        for block in rows.split(BLOCK_ROWS[values.device.type], dim=1)
    ]
    rest = values[:, num_rows * ROW :]
    if rest.shape[1] or not num_rows:
        parts.append((rest.long() * weights[:, : rest.shape[1]]).sum(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)


@lru_cache(maxsize=2)
def _weights(device: torch.device) -> torch.Tensor:
    """Odd int64 ``[2, ROW]``, the same on every rank."""
    generator = torch.Generator("cpu").manual_seed(20250101)
    drawn = torch.randint(-(2**62), 2**62, (2, ROW), generator=generator, device="cpu")
    return (drawn * 2 + 1).to(device)


def compare_fingerprints(
    gathered: list[dict[Piece, str]], iteration: int
) -> tuple[str | None, int]:
    """Compare the fingerprints of all ranks, given in rank order. No communication.

    Returns:
        The message for replicas that differ, or None; the number of pieces with a replica.
    """
    holders: dict[Piece, dict[int, str]] = {}
    for rank, prints in enumerate(gathered):
        for piece, text in prints.items():
            holders.setdefault(piece, {})[rank] = text
    differing = {p: ranks for p, ranks in holders.items() if len(set(ranks.values())) > 1}
    num_compared = sum(len(ranks) > 1 for ranks in holders.values())
    return (_report(differing, iteration) if differing else None), num_compared


def _report(holders: dict[Piece, dict[int, str]], iteration: int) -> str:
    """A line that says it all, then a table of the first pieces."""
    differing = sorted(holders, key=lambda piece: piece.order)
    counts = Counter(piece.kind for piece in differing)
    by_kind = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
    majority, *others = _groups(holders[differing[0]])
    outsiders = [rank for _, ranks in others for rank in ranks]
    lines = [
        f"replicas differ at iteration {iteration}: {len(differing)} "
        f"piece{'s' if len(differing) > 1 else ''} ({by_kind}), first {differing[0].name}; "
        f"{rank_names(outsiders)} {'differ' if len(outsiders) > 1 else 'differs'} from "
        f"{rank_names(majority[1])}"
    ]
    table = [("kind", "piece", "offset", "shape", "ranks that agree: fingerprint")]
    for piece in differing[:SHOWN_PIECES]:
        agree = "; ".join(
            f"{rank_names(ranks)}: {text[:SHOWN_DIGITS]}.."
            for text, ranks in _groups(holders[piece])
        )
        row = (piece.kind, piece.name, str(list(piece.offset)), str(list(piece.shape)), agree)
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    if len(differing) > SHOWN_PIECES:
        lines.append(f"and {len(differing) - SHOWN_PIECES} more")
    return "\n".join(lines)


def _groups(ranks: dict[int, str]) -> list[tuple[str, list[int]]]:
    """Fingerprints with the ranks that have them: most ranks first, then the lowest rank."""
    groups: dict[str, list[int]] = {}
    for rank, text in ranks.items():
        groups.setdefault(text, []).append(rank)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[1]))
