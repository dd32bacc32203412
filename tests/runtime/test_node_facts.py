"""What makes a node a bad one, from the facts of all ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vqmoe_megatron import __version__
from vqmoe_megatron.runtime.node_facts import NodeFacts, collect_facts, compare_nodes, node_name

RUN_DIR = Path("/shared/run")


def four_ranks(**changes: tuple[int, object]) -> list[NodeFacts]:
    """Two ranks on each of n1 and n2; ``name=(rank, value)`` changes one rank's fact."""
    same = dict(python="3.11", torch="2.13", megatron_core="0.16.1", vqmoe_megatron="0.4")
    room = dict(num_devices=8, free_bytes=2**40, free_inodes=10**6, sees_token=True)
    facts = [NodeFacts(rank=r, node=f"n{1 + r // 2}", **same, **room) for r in range(4)]
    for name, (rank, value) in changes.items():
        facts[rank] = dataclasses.replace(facts[rank], **{name: value})
    return facts


def test_equal_nodes_have_no_problem() -> None:
    assert compare_nodes(four_ranks(), RUN_DIR) == []
    assert compare_nodes(four_ranks(free_inodes=(1, None)), RUN_DIR) == []


@pytest.mark.parametrize(
    ("name", "value", "label"),
    [
        ("python", "3.10", "Python is 3.10 on n2, elsewhere 3.11"),
        ("torch", "2.12", "torch is 2.12 on n2, elsewhere 2.13"),
        ("megatron_core", "0.15", "megatron-core is 0.15 on n2, elsewhere 0.16.1"),
        ("vqmoe_megatron", "0.3", "vqmoe_megatron is 0.3 on n2, elsewhere 0.4"),
        ("num_devices", 7, "number of CUDA devices is 7 on n2, elsewhere 8"),
    ],
)
def test_the_odd_one_out_is_named(name, value, label) -> None:
    (problem,) = compare_nodes(four_ranks(**{name: (3, value)}), RUN_DIR)
    assert problem.text == label and problem.nodes == ("n2",)


def test_most_ranks_are_right_even_against_the_first() -> None:
    (problem,) = compare_nodes(four_ranks(torch=(0, "2.12")), RUN_DIR)
    assert problem.nodes == ("n1",)


def test_a_node_that_sees_another_folder() -> None:
    facts = four_ranks(sees_token=(2, False), free_bytes=(2, 0))
    (problem,) = compare_nodes(facts, RUN_DIR)
    assert problem.nodes == ("n2",)
    assert "/shared/run is not the same folder on n2" in problem.text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("free_bytes", 2**20, "/shared/run has 1 MiB free, less than 64 MiB"),
        ("free_inodes", 7, "/shared/run has 7 inodes free, less than 1000"),
    ],
)
def test_a_shared_shortage_is_no_nodes_fault(name, value, text) -> None:
    (problem,) = compare_nodes(four_ranks(**{name: (1, value)}), RUN_DIR)
    assert problem.text.startswith(text) and problem.nodes == ()


def test_facts_of_this_machine_survive_the_store(tmp_path) -> None:
    facts = collect_facts(3, tmp_path, True)
    assert NodeFacts.from_json(facts.to_json()) == facts
    assert facts.vqmoe_megatron == __version__ and facts.free_bytes > 0
    assert collect_facts(3, tmp_path / "missing", False).free_bytes == 0


def test_slurm_names_the_node() -> None:
    assert node_name({"SLURMD_NODENAME": "n7"}) == "n7"
    assert node_name({}) != ""
