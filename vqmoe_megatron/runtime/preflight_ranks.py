"""Try a world of ranks before training is started in it: nodes, network, run directory.

1. All ranks meet at MASTER_ADDR:MASTER_PORT, as training will.
2. Rank 0 puts a token into the run directory; every rank looks for it and writes the facts of its
   node (:mod:`vqmoe_megatron.runtime.node_facts`) into the store.
3. Every rank takes part in an all-reduce and an all-to-all over the world, whose answers are known,
   in a thread: a network that swallows them must not swallow the report.
4. Rank 0 reads what every rank wrote, or that it wrote nothing, and gives the verdict to all.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vqmoe_megatron.runtime.meeting_place import MeetingPlace
from vqmoe_megatron.runtime.node_facts import (
    NodeFacts,
    Problem,
    collect_facts,
    compare_nodes,
    nodes_of_ranks,
)
from vqmoe_megatron.runtime.rank_names import rank_names
from vqmoe_megatron.runtime.rendezvous import meet
from vqmoe_megatron.runtime.world import RankVariables

COLLECTIVE_SECONDS = 60.0
FACTS_SECONDS = 60.0  # for a rank that has met the others to look at its node
POLL_SECONDS = 0.05
ROWS_PER_PEER = 16  # int64 values that a rank sends to each other rank
RIGHT = "right"


@dataclass(frozen=True)
class PreflightReport:
    """What rank 0 found out; other ranks know ``is_good`` only."""

    is_good: bool
    facts: tuple[NodeFacts, ...] = ()
    wrong_collectives: Mapping[int, str] = field(default_factory=dict)  # by rank: what was wrong
    problems: tuple[Problem, ...] = ()

    @property
    def bad_nodes(self) -> tuple[str, ...]:
        """The nodes to leave out, each once."""
        return tuple(dict.fromkeys(node for problem in self.problems for node in problem.nodes))


def check_world(
    variables: RankVariables, device: str, run_dir: Path, wait_seconds: float = 300.0
) -> PreflightReport:
    """Run the checks above on this rank. The process should end soon after: hard, if it can hang.

    Communicates: with all ranks, through the store and a world process group.

    Raises:
        RendezvousFailed: when not all ranks met; on rank 0 it names the missing ones.
        ValueError: when several ranks are told to meet but not where.
        OSError: when rank 0 cannot write into ``run_dir``.
    """
    rank, world_size = variables.rank, variables.world_size
    if world_size == 1:
        store: torch.distributed.Store = torch.distributed.HashStore()
    else:
        place = MeetingPlace.from_environ(os.environ)
        store = meet(place, rank, world_size, wait_seconds=wait_seconds)
    token = run_dir / f".preflight_{os.environ.get('SLURM_JOB_ID', os.getpid())}"
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        token.write_text("made by vqmoe preflight\n")
        store.set("token", token.name)
    try:
        name = _read(store, "token", FACTS_SECONDS)
        sees_token = name is not None and (run_dir / name).exists()
        store.set(f"facts/{rank}", collect_facts(rank, run_dir, sees_token).to_json())
        _collectives_in_thread(store, variables, device)
        if rank == 0:
            report = _judge(store, world_size, run_dir)
            store.set("verdict", "good" if report.is_good else "bad")
            _see_off(store, world_size)
            return report
        verdict = _read(store, "verdict", FACTS_SECONDS + 3 * COLLECTIVE_SECONDS)
        store.set(f"read/{rank}", "")
        return PreflightReport(verdict == "good")
    finally:
        if rank == 0:
            token.unlink(missing_ok=True)


def _collectives_in_thread(
    store: torch.distributed.Store, variables: RankVariables, device: str
) -> None:
    own_connection = store.clone()  # a connection serves one caller, who may block in it

    def run() -> None:
        store = own_connection
        try:
            answer = _collectives(store, variables, device)
        except Exception as error:  # whatever it is, the report says it
            answer = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        store.set(f"collectives/{variables.rank}", answer)

    threading.Thread(target=run, daemon=True).start()


def _read(store: torch.distributed.Store, key: str, seconds: float) -> str | None:
    """Wait for a key without keeping the store's connection busy; None when time is over."""
    deadline = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)
    return store.get(key).decode()


def _collectives(store: torch.distributed.Store, variables: RankVariables, device: str) -> str:
    """Check both collectives; communicates over all ranks."""
    rank, world_size = variables.rank, variables.world_size
    if device == "cuda":
        torch.cuda.set_device(variables.local_rank % torch.cuda.device_count())
    torch.distributed.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        store=torch.distributed.PrefixStore("collectives_pg", store),
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    total = torch.full((ROWS_PER_PEER,), rank + 1, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(total)
    peers = torch.arange(world_size, dtype=torch.int64, device=device)
    sent = (rank * world_size + peers).repeat_interleave(ROWS_PER_PEER)
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent)  # also after a wrong sum: peers wait for it
    if not bool((total == world_size * (world_size + 1) // 2).all()):
        return f"all-reduce gave {total[0].item()}, not {world_size * (world_size + 1) // 2}"
    expected = (peers * world_size + rank).repeat_interleave(ROWS_PER_PEER)
    if not torch.equal(received, expected):
        wrong = (received != expected).nonzero().flatten() // ROWS_PER_PEER
        return f"all-to-all brought wrong rows from {rank_names(wrong.tolist())}"
    return RIGHT


def _judge(store: torch.distributed.Store, world_size: int, run_dir: Path) -> PreflightReport:
    """Read what the ranks wrote; a rank that is silent is a problem of its node."""
    facts, problems = [], []
    facts_deadline = time.monotonic() + FACTS_SECONDS
    for rank in range(world_size):
        text = _read(store, f"facts/{rank}", facts_deadline - time.monotonic())
        if text is None:
            nodes = nodes_of_ranks(frozenset({rank}), world_size, os.environ)
            problems.append(Problem(f"rank {rank} met the others and then fell silent", nodes))
        else:
            facts.append(NodeFacts.from_json(text))
    problems += compare_nodes(facts, run_dir)
    deadline = time.monotonic() + 2 * COLLECTIVE_SECONDS  # joining the group, then its operations
    wrong = {}
    for fact in facts:
        silence = f"no answer within {2 * COLLECTIVE_SECONDS:g} s"
        answer = _read(store, f"collectives/{fact.rank}", deadline - time.monotonic()) or silence
        if answer != RIGHT:
            wrong[fact.rank] = answer
            problems.append(Problem(f"rank {fact.rank}: {answer}"))
    # One bad node spoils everybody's collectives: only where some are right are the others guilty.
    guilty = {fact.node for fact in facts if fact.rank in wrong}
    if guilty and len(facts) == world_size and guilty != {fact.node for fact in facts}:
        problems.append(Problem("collectives fail on some nodes only", tuple(sorted(guilty))))
    return PreflightReport(not problems, tuple(facts), wrong, tuple(problems))


def _see_off(store: torch.distributed.Store, world_size: int) -> None:
    """Keep the store until the others know the verdict, five seconds at most."""
    deadline = time.monotonic() + 5.0
    keys = [f"read/{rank}" for rank in range(1, world_size)]
    while keys and not store.check(keys) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
