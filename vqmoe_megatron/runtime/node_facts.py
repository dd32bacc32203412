"""What one rank says about its node, and which nodes differ from the others.

Every rank collects its facts, rank 0 compares them: versions and devices must be equal everywhere
(the odd ones out are bad), the run directory must be the same folder with room in it. No
communication and no process group here.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch

from vqmoe_megatron import __version__

MINIMUM_FREE_BYTES = 64 * 1024**2  # logs and a small checkpoint
MINIMUM_FREE_INODES = 1000  # a checkpoint has a few files per rank
MUST_BE_EQUAL = {
    "python": "Python",
    "torch": "torch",
    "megatron_core": "megatron-core",
    "vqmoe_megatron": "vqmoe_megatron",
    "num_devices": "number of CUDA devices",
}


@dataclass(frozen=True)
class NodeFacts:
    """One rank's view of its node. ``free_inodes`` is None where the file system has no limit."""

    rank: int
    node: str
    python: str
    torch: str
    megatron_core: str
    vqmoe_megatron: str
    num_devices: int
    free_bytes: int
    free_inodes: int | None
    sees_token: bool  # the file that rank 0 put into the run directory

    def to_json(self) -> str:
        """Return the facts as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeFacts:
        """Return the facts of :meth:`to_json`."""
        values = json.loads(text)
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Problem:
    """Something that must not be, and the nodes to leave out for it (maybe none)."""

    text: str
    nodes: tuple[str, ...] = ()


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """Return Slurm's name of this node, else the host's name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def collect_facts(rank: int, run_dir: Path, sees_token: bool) -> NodeFacts:
    """Look at this node. A run directory that is not there has no room: 0 bytes.

    Args:
        rank: of this process.
        run_dir: where the run will write, on a file system shared by all nodes.
        sees_token: whether the file that rank 0 has just made is in ``run_dir``.
    """
    try:
        room = os.statvfs(run_dir)
        free_bytes = room.f_bavail * room.f_frsize
        free_inodes = room.f_favail if room.f_files else None
    except OSError:
        free_bytes, free_inodes = 0, None
    try:
        megatron_core = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        megatron_core = "not installed"
    return NodeFacts(
        rank=rank,
        node=node_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        megatron_core=megatron_core,
        vqmoe_megatron=__version__,
        num_devices=torch.cuda.device_count(),
        free_bytes=free_bytes,
        free_inodes=free_inodes,
        sees_token=sees_token,
    )


def compare_nodes(facts: Iterable[NodeFacts], run_dir: Path) -> list[Problem]:
    """Return every difference and every shortage, with the nodes to blame.

    The value of most ranks is right; in a tie that of the lowest rank.
    """
    everyone = sorted(facts, key=lambda fact: fact.rank)
    problems = []
    for name, label in MUST_BE_EQUAL.items():
        values = [getattr(fact, name) for fact in everyone]
        common = max(values, key=Counter(values).__getitem__)
        for odd in sorted({value for value in values if value != common}, key=str):
            nodes = _nodes(fact for fact in everyone if getattr(fact, name) == odd)
            problems.append(
                Problem(f"{label} is {odd} on {_join(nodes)}, elsewhere {common}", nodes)
            )
    problems += _room_problems(everyone, run_dir)
    return problems


def _room_problems(everyone: list[NodeFacts], run_dir: Path) -> list[Problem]:
    problems = []
    blind = _nodes(fact for fact in everyone if not fact.sees_token)
    if blind:
        text = f"{run_dir} is not the same folder on {_join(blind)}: rank 0's file is not there"
        problems.append(Problem(text, blind))
    seeing = [fact for fact in everyone if fact.sees_token]  # one file system: one problem
    free_bytes = min((fact.free_bytes for fact in seeing), default=MINIMUM_FREE_BYTES)
    if free_bytes < MINIMUM_FREE_BYTES:
        problems.append(
            Problem(
                f"{run_dir} has {free_bytes / 1024**2:.0f} MiB free, less than "
                f"{MINIMUM_FREE_BYTES / 1024**2:.0f} MiB; free some"
            )
        )
    inodes = [fact.free_inodes for fact in seeing if fact.free_inodes is not None]
    if inodes and min(inodes) < MINIMUM_FREE_INODES:
        problems.append(
            Problem(
                f"{run_dir} has {min(inodes)} inodes free, less than {MINIMUM_FREE_INODES}; "
                "remove files"
            )
        )
    return problems


def _nodes(facts: Iterable[NodeFacts]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(fact.node for fact in facts))


def _join(nodes: tuple[str, ...]) -> str:
    return ", ".join(nodes)


def nodes_of_ranks(
    ranks: frozenset[int], world_size: int, environ: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the nodes of ``ranks``, equally many on each, from VQMOE_NODES ("n1 n2"); () without.

    For ranks that never came and so could not say where they are.
    """
    nodes = environ.get("VQMOE_NODES", "").split()
    if not nodes or world_size % len(nodes):
        return ()
    ranks_per_node = world_size // len(nodes)
    return tuple(dict.fromkeys(nodes[rank // ranks_per_node] for rank in sorted(ranks)))
